"""Rotary positions in one launch, with the bits of the operators that it stands for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.ops.gpu.launch import launch
from quantkit.ops.gpu.layout import power_of_two


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x cos + (-right, left) sin``, where left and right are the halves of the channels of ``x [..., D]``."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def rotary(x: Tensor, cos: Tensor, sin: Tensor, strides: tuple[int, ...]) -> Tensor:
    """:func:`rotary_reference` of ``x [B, H, T, D]``; cos and sin broadcast to it. Channels lie side by side in all of them.

    Args:
        strides: of the result.
    """
    b, h, t, d = x.shape
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    cos, sin = cos.expand(x.shape), sin.expand(x.shape)
    launch(
        rotary_kernel, (b * h * t,),
        x, cos, sin, out, h, t, *x.stride()[:3], *cos.stride()[:3], *sin.stride()[:3], *strides[:3], d // 2,
        power_of_two(d // 2), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _row(P, b, h, t, stride_b, stride_h, stride_t):
    return P + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + t.to(tl.int64) * stride_t


@triton.jit
def _summed(x, cos, y, sin, OUT):
    """``x cos + y sin``, where each product is rounded to 16 bit, as operators do it one by one."""
    a = (x.to(tl.float32) * cos.to(tl.float32)).to(OUT.dtype.element_ty).to(tl.float32)
    b = (y.to(tl.float32) * sin.to(tl.float32)).to(OUT.dtype.element_ty).to(tl.float32)
    return (a + b).to(OUT.dtype.element_ty)


@triton.jit
def rotary_kernel(X, COS, SIN, OUT, H, T, xb, xh, xt, cb, ch, ct, sb, sh, st, ob, oh, ot, HALF, B: tl.constexpr):
    """One row of channels."""
    row, i = tl.program_id(0), tl.arange(0, B)
    t, h, b = row % T, row // T % H, row // T // H
    x, cos, sin = _row(X, b, h, t, xb, xh, xt), _row(COS, b, h, t, cb, ch, ct), _row(SIN, b, h, t, sb, sh, st)
    out, mask = _row(OUT, b, h, t, ob, oh, ot), i < HALF
    left, right = tl.load(x + i, mask=mask, other=0.0), tl.load(x + HALF + i, mask=mask, other=0.0)
    first = _summed(left, tl.load(cos + i, mask=mask, other=0.0), -right, tl.load(sin + i, mask=mask, other=0.0), OUT)
    tl.store(out + i, first, mask=mask)
    cos, sin = tl.load(cos + HALF + i, mask=mask, other=0.0), tl.load(sin + HALF + i, mask=mask, other=0.0)
    tl.store(out + HALF + i, _summed(right, cos, left, sin, OUT), mask=mask)
