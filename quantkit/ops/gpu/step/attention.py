"""Attention of a few queries over a cache of keys and values, which heads share in groups.

PyTorch's fused attention takes no groups beside a mask, so that models copy keys and values for every head of the queries
before: at 16 sequences of 1,024 tokens that takes most of a step. Here each program reads a part of one head of the cache, once
for all queries of its group, and a second launch joins the parts (flash decoding). Parts that are masked are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from quantkit.ops.gpu.devices import PROCESSORS
from quantkit.ops.gpu.launch import launch
from quantkit.ops.gpu.layout import ceil_div, power_of_two

BLOCK = 64
"""Positions that a program reads at a time."""
QUERIES = 16
"""Rows of the smallest product of Tensor Cores: so many queries of one head of the cache."""


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``[B, H, T, D]`` of queries ``q [B, H, T, D]``, ``k`` and ``v [B, KV, S, D]``; H is a multiple of KV.

    Args:
        mask: broadcasts to ``[B, H, T, S]``: True where a position counts, or numbers that are added.
        scale: of the products of queries and keys.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def why_not(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """None if :func:`attention` takes these, else why not."""
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype or v.dtype != q.dtype:
        return "it computes in 16 bit"
    (b, h, t, d), kv = q.shape, k.shape[1]
    if k.shape != v.shape or k.shape != (b, kv, k.shape[2], d) or h % kv or not 1 <= h // kv * t <= QUERIES or not k.shape[2]:
        return "it takes a few queries a head"
    if d < 16 or d & (d - 1) or d > 256 or q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return "channels of a head are no power of two, or do not lie side by side"
    if mask is not None and (mask.dim() != 4 or (mask.dtype != torch.bool and not mask.is_floating_point())):
        return "the mask is of another kind"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, strides: tuple[int, ...] | None = None
) -> Tensor:
    """:func:`attention_reference`, but for the order of sums; rows of which every position is masked are 0.

    Args:
        strides: of the result, whose channels lie side by side; left out, it is contiguous.
    """
    (b, h, t, d), (kv, s) = q.shape, k.shape[1:3]
    blocks = ceil_div(s, BLOCK)
    each = ceil_div(blocks, max(1, min(blocks, ceil_div(2 * PROCESSORS, b * kv))))
    parts = ceil_div(blocks, each)
    out = (
        q.new_empty((b, h, t, d)) if strides is None else torch.empty_strided(q.shape, strides, dtype=q.dtype, device=q.device)
    )
    sums = q.new_empty((b * h * t, parts, d), dtype=torch.float32) if parts > 1 else None
    tops = q.new_empty((b * h * t, parts, 2), dtype=torch.float32) if parts > 1 else None
    seen = None if mask is None else mask.expand(b, h, t, s)
    boolean = seen is not None and seen.dtype == torch.bool
    launch(
        attention_kernel, (b * kv, parts),
        q, k, v, seen.view(torch.uint8) if seen is not None and boolean else seen, out, sums, tops, scale, kv, h // kv, t, s,
        each * BLOCK, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0, 0) if seen is None else seen.stride()),
        *out.stride()[:3], parts, boolean, QUERIES, BLOCK, d, num_warps=4, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        launch(
            join_kernel, (b * h * t,), sums, tops, out, h, t, *out.stride()[:3], parts, power_of_two(parts), d, num_warps=4
        )  # fmt: skip
    return out


@triton.jit
def attention_kernel(
    Q, K, V, MASK, OUT, SUMS, TOPS, scale, KV, G, T, S, each, qb, qh, qt, kb, kh, ks, vb, vh, vs, mb, mh, mt, ms, ob, oh, ot,
    parts, BOOL: tl.constexpr, R: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """``each`` positions of one head of the cache, for the G heads of T queries that share it."""
    group, part = tl.program_id(0), tl.program_id(1)
    batch, head = (group // KV).to(tl.int64), group % KV
    r, d = tl.arange(0, R), tl.arange(0, D)
    real, near = r < G * T, tl.minimum(r, G * T - 1)
    query, t = (head * G + near // T).to(tl.int64), (near % T).to(tl.int64)
    q = tl.load(Q + batch * qb + query[:, None] * qh + t[:, None] * qt + d[None, :])
    top = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, D), tl.float32)
    first = part * each
    for start in range(first, tl.minimum(first + each, S), B):
        n = start + tl.arange(0, B)
        inside, place = n < S, tl.minimum(n, S - 1).to(tl.int64)
        bias = tl.where(inside, 0.0, float("-inf"))[None, :] + tl.zeros((R, B), tl.float32)
        if MASK is not None:
            at = MASK + batch * mb + query[:, None] * mh + t[:, None] * mt + place[None, :] * ms
            if BOOL:
                bias = tl.where(tl.load(at) != 0, bias, float("-inf"))
            else:
                bias += tl.load(at).to(tl.float32)
        if tl.max(tl.max(bias, 1), 0) > float("-inf"):
            k = tl.load(K + batch * kb + head.to(tl.int64) * kh + place[:, None] * ks + d[None, :])
            v = tl.load(V + batch * vb + head.to(tl.int64) * vh + place[:, None] * vs + d[None, :])
            scores = tl.dot(q, tl.trans(k), out_dtype=tl.float32) * scale + bias
            highest = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(highest > float("-inf"), highest, 0.0)
            p = tl.exp(scores - shift[:, None])
            old = tl.exp(top - shift)
            total = total * old + tl.sum(p, 1)
            acc = acc * old[:, None] + tl.dot(p.to(v.dtype), v, out_dtype=tl.float32)
            top = highest
    if SUMS is None:
        out = OUT + batch * ob + query[:, None] * oh + t[:, None] * ot + d[None, :]
        tl.store(out, (acc / tl.where(total == 0, 1.0, total)[:, None]).to(OUT.dtype.element_ty), mask=real[:, None])
    else:
        row = ((batch * KV * G + query) * T + t) * parts + part
        tl.store(SUMS + row[:, None] * D + d[None, :], acc, mask=real[:, None])
        tl.store(TOPS + row * 2, top, mask=real)
        tl.store(TOPS + row * 2 + 1, total, mask=real)


@triton.jit
def join_kernel(SUMS, TOPS, OUT, H, T, ob, oh, ot, parts, P: tl.constexpr, D: tl.constexpr):
    """One query."""
    row, p, d = tl.program_id(0).to(tl.int64), tl.arange(0, P), tl.arange(0, D)
    real = p < parts
    at = row * parts + p
    top = tl.load(TOPS + at * 2, mask=real, other=float("-inf"))
    highest = tl.max(top, 0)
    weight = tl.exp(top - tl.where(highest > float("-inf"), highest, 0.0))
    total = tl.sum(weight * tl.load(TOPS + at * 2 + 1, mask=real, other=0.0), 0)
    sums = tl.load(SUMS + at[:, None] * D + d[None, :], mask=real[:, None], other=0.0)
    out = OUT + row // (H * T) * ob + row // T % H * oh + row % T * ot + d
    tl.store(out, (tl.sum(sums * weight[:, None], 0) / tl.where(total == 0, 1.0, total)).to(OUT.dtype.element_ty))
