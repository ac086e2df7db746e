"""LLM.int8() as published, without waiting for the host: columns that reached the threshold are listed and gathered on the GPU.

The fast kernels have room for :data:`ROOM` of them; where a batch has more, the portable kernel does the product again. Both
add ``(x - sx q)[:, active] (w sw)[:, active]^T`` to the INT8 product, which is x itself in these columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.ops.gpu.configs import SIDE

ROOM = 4 * SIDE
"""Active columns in the fast kernels."""
ROWS = 32


@triton.jit
def reaching(x, threshold):
    """Whether elements ``x`` float32 are finite and reach it."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return (bits.to(tl.float32, bitcast=True) >= threshold) & (bits < 0x7F800000)


@triton.jit
def list_kernel(REACHED, ACTIVE, K, B: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr):
    """``active [1 + K]``: how many columns are marked in ``reached [K]``, and which, ascending; B columns a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(0) * B
    count = 0
    for start in range(0, first, WHOLE):  # every program counts those before its own
        k = start + tl.arange(0, WHOLE)
        count += tl.sum(tl.load(REACHED + k, mask=k < first, other=0), 0)
    k = first + tl.arange(0, B)
    mark = tl.load(REACHED + k, mask=k < K, other=0)
    tl.store(ACTIVE + count + tl.cumsum(mark, 0), k, mask=mark != 0)
    if first + B >= K:
        tl.store(ACTIVE, count + tl.sum(mark, 0))


@triton.jit
def residual(X, Q, SX, row, at, mask, K, stride_m, stride_k):
    """What rounding took from ``x [rows, columns]``, in its dtype."""
    x = tl.load(X + row[:, None] * stride_m + at[None, :] * stride_k, mask=mask, other=0.0)
    q = tl.load(Q + row[:, None] * K + at[None, :], mask=mask, other=0)
    return (x.to(tl.float32) - q.to(tl.float32) * tl.load(SX + row)[:, None]).to(x.dtype)


@triton.jit
def gather_kernel(
    X, Q, SX, W, SW, ACTIVE, XS, WS, M, N, K, stride_m, stride_k,
    ROOM: tl.constexpr, SIDE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """``xs [M, ROOM]`` and ``ws [N, ROOM]``, R rows a program, in whole steps of SIDE columns; the rest is undefined."""
    gdc_launch_dependents()
    gdc_wait()
    count, of_x = tl.minimum(tl.load(ACTIVE), ROOM), tl.cdiv(M, R)
    program = tl.program_id(0)
    for start in range(0, count, SIDE):
        j = start + tl.arange(0, SIDE)
        real = (j < count)[None, :]
        at = tl.load(ACTIVE + 1 + j, mask=j < count, other=0)
        if program < of_x:
            row = program.to(tl.int64) * R + tl.arange(0, R)
            near = tl.minimum(row, M - 1)  # rows past the end read the last one again
            x = residual(X, Q, SX, near, at, real, K, stride_m, stride_k)
            tl.store(XS + row[:, None] * ROOM + j[None, :], x, mask=(row < M)[:, None])
        else:
            row = (program - of_x).to(tl.int64) * R + tl.arange(0, R)
            mask = (row < N)[:, None]
            w = tl.load(W + row[:, None] * K + at[None, :], mask=mask & real, other=0).to(tl.float32)
            w *= tl.load(SW + row, mask=row < N, other=0.0)[:, None]
            tl.store(WS + row[:, None] * ROOM + j[None, :], w.to(WS.dtype.element_ty), mask=mask)


def list_columns(reached: Tensor, pdl: bool) -> Tensor:
    """``[1 + K]`` int32, how many of ``reached [K]`` int32 are 1 and which, ascending; what lies beyond is undefined."""
    k = len(reached)
    active, block = reached.new_empty(1 + k), 1024
    list_kernel[(max(triton.cdiv(k, block), 1),)](
        reached, active, k, block, 4096, pdl, num_warps=8, **({"launch_pdl": True} if pdl else {})
    )
    return active


def gather(x: Tensor, q: Tensor, sx: Tensor, weight: Tensor, sw: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Side operands ``[M, ROOM]`` and ``[N, ROOM]`` in the dtype of ``x [M, K]``, as far as columns are active; Hopper only."""
    (m, k), n = q.shape, len(weight)
    xs, ws = x.new_empty((m, ROOM)), x.new_empty((n, ROOM))
    gather_kernel[(triton.cdiv(m, ROWS) + triton.cdiv(n, ROWS),)](
        x, q, sx, weight, sw, active, xs, ws, m, n, k, *x.stride(), ROOM, SIDE, ROWS,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return xs, ws
