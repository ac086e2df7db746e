"""Device code, in Triton, for the INT8 matrix product of any shape on any GPU: pointers, masks, ``tl.dot``.

``y = (acc - zero * wsum) * sx * sw + side sidew^T + bias``, in that order, in float32. Where groups of channels have scales of
their own, acc is the sum of the groups' products, each times its multipliers of the token and of the weight's row, as
:mod:`quantkit.ops.reference` adds them up. Active columns (see :mod:`.columns`) are gathered on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from quantkit.ops.gpu.product.columns import residual
from quantkit.ops.gpu.product.walk import tile_of


@triton.jit
def multiply_tile(
    t, Q, W, Y, SX, SW, ZERO, WSUM, BIAS, SIDE, SIDEW, BORDERS, ACTIVE, M, N, K, zero_stride, side_count, side_m, side_k,
    GROUPS: tl.constexpr, BY_ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile ``[BM, BN]`` of ``y [M, N]``; see :class:`.request.ProductRequest` for the arguments."""
    tm, tn = tile_of(t, tl.cdiv(M, BM), tl.cdiv(N, BN), BAND)
    m, n, k = tm * BM + tl.arange(0, BM), tn * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end read the last one again: loads then need no mask along M and N.
    row, column = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    q, w = Q + row[:, None] * K + k[None, :], W + column[None, :] * K + k[:, None]
    if GROUPS == 1:
        acc = tl.zeros((BM, BN), tl.int32)
        for start in range(0, K, BK):
            if EVEN_K:
                acc = tl.dot(tl.load(q + start), tl.load(w + start), acc, out_dtype=tl.int32)
            else:
                a = tl.load(q + start, mask=(start + k < K)[None, :], other=0)
                acc = tl.dot(a, tl.load(w + start, mask=(start + k < K)[:, None], other=0), acc, out_dtype=tl.int32)
        if ZERO is not None:
            acc -= tl.load(ZERO + row * zero_stride)[:, None] * tl.load(WSUM + column)[None, :]
    else:
        acc = tl.zeros((BM, BN), tl.int32)
        for g in range(GROUPS):
            first, last = tl.multiple_of(tl.load(BORDERS + g), 16), tl.multiple_of(tl.load(BORDERS + g + 1), 16)
            # into accumulators of its own: tensor cores saturate sums here, and those of earlier groups have other multipliers
            own = tl.zeros((BM, BN), tl.int32)
            for start in range(first, last, BK):
                a = tl.load(q + start, mask=(start + k < last)[None, :], other=0)
                own = tl.dot(a, tl.load(w + start, mask=(start + k < last)[:, None], other=0), own, out_dtype=tl.int32)
            if ZERO is not None:
                zero = tl.load(ZERO + row * zero_stride + g)
                own -= zero[:, None] * tl.load(WSUM + g * N + column)[None, :]
            own *= tl.load(SX + row * (1 + GROUPS) + 1 + g).to(tl.int32)[:, None]
            acc += own * tl.load(SW + (1 + g) * N + column).to(tl.int32)[None, :] if BY_ROW else own
    WIDTH: tl.constexpr = 1 if GROUPS == 1 else 1 + GROUPS
    y = acc.to(tl.float32) * tl.load(SX + row * WIDTH)[:, None] * tl.load(SW + column)[None, :]
    j = tl.arange(0, 16)
    if ACTIVE is not None:
        count = tl.load(ACTIVE)
        for start in range(0, count, 16):
            real = start + j < count
            at = tl.load(ACTIVE + 1 + start + j, mask=real, other=0)
            a = residual(SIDE, Q, SX, row, at, real[None, :], K, side_m, side_k)
            b = tl.load(W + column[None, :] * K + at[:, None], mask=real[:, None], other=0).to(tl.float32)
            y = tl.dot(a, (b * tl.load(SW + column)[None, :]).to(a.dtype), y, input_precision="ieee")
    if SIDEW is not None:
        for start in range(0, side_count, 16):  # into the accumulators that held the integers
            real = start + j < side_count
            a = tl.load(SIDE + row[:, None] * side_count + (start + j)[None, :], mask=real[None, :], other=0.0)
            b = tl.load(SIDEW + column[None, :] * side_count + (start + j)[:, None], mask=real[:, None], other=0.0)
            y = tl.dot(a, b, y, input_precision="ieee")
    if BIAS is not None:
        y += tl.load(BIAS + column).to(tl.float32)[None, :]
    tl.store(Y + m.to(tl.int64)[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def matmul_kernel(
    Q, W, Y, SX, SW, ZERO, WSUM, BIAS, SIDE, SIDEW, BORDERS, ACTIVE, M, N, K, zero_stride, side_count, side_m, side_k,
    GROUPS: tl.constexpr, BY_ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    EVEN_K: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """All tiles, one for each program; with ROOM a few programs share them, and have nothing to do for ROOM active columns."""
    if ROOM == 0:
        multiply_tile(
            tl.program_id(0), Q, W, Y, SX, SW, ZERO, WSUM, BIAS, SIDE, SIDEW, BORDERS, ACTIVE, M, N, K, zero_stride,
            side_count, side_m, side_k, GROUPS, BY_ROW, BM, BN, BK, BAND, EVEN_K,
        )  # fmt: skip
    else:
        gdc_wait()
        if tl.load(ACTIVE) > ROOM:
            for t in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
                multiply_tile(
                    t, Q, W, Y, SX, SW, ZERO, WSUM, BIAS, SIDE, SIDEW, BORDERS, ACTIVE, M, N, K, zero_stride, side_count,
                    side_m, side_k, GROUPS, BY_ROW, BM, BN, BK, BAND, EVEN_K,
                )  # fmt: skip
