"""INT8 matrix product for any shape on any GPU that Triton knows: pointers, masks, ``tl.dot``.

``y = (acc - zero * wsum) * sx * sw + side sidew^T + bias``, in that order, in float32. With K in segments, each of which counts
so many times for each token and row, acc is what :func:`quantkit.ops.reference.segment_sum` adds up. Active columns (see
:mod:`.columns`) are gathered on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from quantkit.ops.gpu.columns import ROOM, residual
from quantkit.ops.gpu.configs import PROCESSORS, Tile


@triton.jit
def tile_of(t, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of tile ``t``: columns within groups of GROUP rows, so that neighbours in time share what is in L2."""
    first = t // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    rest = t % (GROUP * tiles_n)
    return first + rest % height, rest // height


@triton.jit
def multiply_tile(
    t, Q, W, Y, SX, SW, ZERO, WSUM, BIAS, SIDE, SIDEW, BORDERS, ACTIVE, M, N, K, zero_stride, side_count, side_m, side_k,
    SEGMENTS: tl.constexpr, BY_ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile ``[BM, BN]`` of ``y [M, N]``; see :func:`matmul` for the arguments."""
    tm, tn = tile_of(t, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    m, n, k = tm * BM + tl.arange(0, BM), tn * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end read the last one again: loads then need no mask along M and N.
    row, column = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    q, w = Q + row[:, None] * K + k[None, :], W + column[None, :] * K + k[:, None]
    if SEGMENTS == 1:
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
        for g in range(SEGMENTS):
            first, last = tl.multiple_of(tl.load(BORDERS + g), 16), tl.multiple_of(tl.load(BORDERS + g + 1), 16)
            # into accumulators of its own: tensor cores saturate sums here, and those of earlier segments are in other units
            own = tl.zeros((BM, BN), tl.int32)
            for start in range(first, last, BK):
                a = tl.load(q + start, mask=(start + k < last)[None, :], other=0)
                own = tl.dot(a, tl.load(w + start, mask=(start + k < last)[:, None], other=0), own, out_dtype=tl.int32)
            if ZERO is not None:
                zero = tl.load(ZERO + row * zero_stride + g)
                own -= zero[:, None] * tl.load(WSUM + g * N + column)[None, :]
            own *= tl.load(SX + row * (1 + SEGMENTS) + 1 + g).to(tl.int32)[:, None]
            acc += own * tl.load(SW + (1 + g) * N + column).to(tl.int32)[None, :] if BY_ROW else own
    WIDTH: tl.constexpr = 1 if SEGMENTS == 1 else 1 + SEGMENTS
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
    SEGMENTS: tl.constexpr, BY_ROW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN_K: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """All tiles, one for each program; with ROOM a few programs share them, and have nothing to do for ROOM active columns."""
    if ROOM == 0:
        multiply_tile(
            tl.program_id(0), Q, W, Y, SX, SW, ZERO, WSUM, BIAS, SIDE, SIDEW, BORDERS, ACTIVE, M, N, K, zero_stride,
            side_count, side_m, side_k, SEGMENTS, BY_ROW, BM, BN, BK, GROUP, EVEN_K,
        )  # fmt: skip
    else:
        gdc_wait()
        if tl.load(ACTIVE) > ROOM:
            for t in range(tl.program_id(0), tl.cdiv(M, BM) * tl.cdiv(N, BN), tl.num_programs(0)):
                multiply_tile(
                    t, Q, W, Y, SX, SW, ZERO, WSUM, BIAS, SIDE, SIDEW, BORDERS, ACTIVE, M, N, K, zero_stride, side_count,
                    side_m, side_k, SEGMENTS, BY_ROW, BM, BN, BK, GROUP, EVEN_K,
                )  # fmt: skip


def matmul(
    q: Tensor,
    sx: Tensor,
    weight: Tensor,
    sw: Tensor,
    dtype: torch.dtype,
    *,
    zero: Tensor | None = None,
    wsum: Tensor | None = None,
    bias: Tensor | None = None,
    side: Tensor | None = None,
    side_weight: Tensor | None = None,
    borders: Tensor | None = None,
    active: Tensor | None = None,
    done: Tensor | None = None,
    config: Tile,
) -> Tensor:
    """``[M, N]`` of ``dtype``.

    Args:
        q, weight: ``[M, K]`` and ``[N, K]`` int8, contiguous.
        sx: ``[M, 1]`` float32, or for G segments of K ``[M, 1 + G]``, :func:`quantkit.core.numerics.shared`.
        sw: ``[N]`` float32, or of segments that count differently in each row ``[1 + G, N]``, a unit and multiples as well.
        zero, wsum: ``[M, G]`` (or ``[G]``, static) and ``[G, N]`` int32: zero points, and sums over segments of the weight.
        bias: ``[N]`` float.
        side, side_weight: ``[M, n]`` and ``[N, n]`` in one float dtype: columns multiplied without rounding.
        borders: ``[G + 1]`` int32, where segments of K start and end: multiples of 16, from 0 to K.
        active: ``[1 + K]`` int32, how many columns to take from ``side`` as they are, and which; ``side [M, K]`` is then what q
            was rounded from, without side_weight, zero or borders.
        done: ``[M, N]``, the result already, but for batches with more active columns than ``columns.ROOM``; Hopper only.
    """
    (m, k), n = q.shape, len(weight)
    y = q.new_empty((m, n), dtype=dtype) if done is None else done
    if not m or not n:
        return y
    tiles = triton.cdiv(m, config.m) * triton.cdiv(n, config.n)
    segments = 1 if borders is None else len(borders) - 1
    matmul_kernel[(tiles if done is None else min(tiles, 2 * PROCESSORS),)](
        q, weight, y, sx, sw, zero, wsum, bias, side, side_weight, borders, active, m, n, k,
        segments if zero is not None and zero.numel() > segments else 0, 0 if side is None else side.shape[1],
        *((0, 0) if side is None else side.stride()), segments, sw.dim() == 2,
        config.m, config.n, config.k, config.group, k % config.k == 0, 0 if done is None else ROOM,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        **({} if done is None else {"launch_pdl": True}),
    )  # fmt: skip
    return y
