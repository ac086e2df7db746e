"""Device code, in Triton, for LLM.int8() as published: columns that reached the threshold are gathered without the host.

``active [1 + K]`` int32 says how many columns there are in this batch, and which. The fast kernels have room for :data:`ROOM`
of them; where a batch has more, the portable kernel does the product again. Both add
``(x - sx q)[:, active] (w sw)[:, active]^T`` to the INT8 product, which makes it that of x itself in these columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.ops.gpu.layout import SIDE

ROOM = 4 * SIDE
"""Active columns in the fast kernels."""
ROWS = 32
"""Rows of x, or of the weight, that a program gathers."""


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
