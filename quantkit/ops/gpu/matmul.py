"""INT8 matrix product for any shape on any GPU that Triton knows: pointers, masks, ``tl.dot``.

``y = (sum over segments g of (acc_g - zero * wsum) * sx[:, g] * sw[:, g]) + side sidew^T + bias``, in that order, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.ops.gpu.configs import Tile


@triton.jit
def tile_of(t, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of tile ``t``: columns within groups of GROUP rows, so that neighbours in time share what is in L2."""
    first = t // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    rest = t % (GROUP * tiles_n)
    return first + rest % height, rest // height


@triton.jit
def matmul_kernel(
    Q, W, Y, SX, SW, ZERO, WSUM, BIAS, SIDE, SIDEW, BORDERS, M, N, K, zero_stride, side_count,
    SEGMENTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile ``[BM, BN]`` of ``y [M, N]``; see :func:`matmul` for the arguments."""
    tm, tn = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
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
        y = acc.to(tl.float32) * tl.load(SX + row)[:, None] * tl.load(SW + column)[None, :]
    else:
        y = tl.zeros((BM, BN), tl.float32)
        for g in range(SEGMENTS):
            first, last = tl.multiple_of(tl.load(BORDERS + g), 16), tl.multiple_of(tl.load(BORDERS + g + 1), 16)
            acc = tl.zeros((BM, BN), tl.int32)
            for start in range(first, last, BK):
                a = tl.load(q + start, mask=(start + k < last)[None, :], other=0)
                acc = tl.dot(a, tl.load(w + start, mask=(start + k < last)[:, None], other=0), acc, out_dtype=tl.int32)
            if ZERO is not None:
                zero = tl.load(ZERO + row * zero_stride + g)
                acc -= zero[:, None] * tl.load(WSUM + column * SEGMENTS + g)[None, :]
            sx, sw = tl.load(SX + row * SEGMENTS + g), tl.load(SW + column * SEGMENTS + g)
            y += acc.to(tl.float32) * sx[:, None] * sw[None, :]
    if SIDE is not None:
        j = tl.arange(0, 16)
        for start in range(0, side_count, 16):  # into the accumulators that held the integers
            real = start + j < side_count
            a = tl.load(SIDE + row[:, None] * side_count + (start + j)[None, :], mask=real[None, :], other=0.0)
            b = tl.load(SIDEW + column[None, :] * side_count + (start + j)[:, None], mask=real[:, None], other=0.0)
            y = tl.dot(a, b, y, input_precision="ieee")
    if BIAS is not None:
        y += tl.load(BIAS + column).to(tl.float32)[None, :]
    tl.store(Y + m.to(tl.int64)[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


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
    config: Tile,
) -> Tensor:
    """``[M, N]`` of ``dtype``.

    Args:
        q, weight: ``[M, K]`` and ``[N, K]`` int8, contiguous.
        sx, sw: ``[M, G]`` and ``[N, G]`` float32, for G segments of K; G is 1 without ``borders``.
        zero, wsum: ``[M, G]`` (or ``[1]``, static) and ``[N, G]`` int32: zero points, and sums over segments of the weight.
        bias: ``[N]`` float.
        side, side_weight: ``[M, n]`` and ``[N, n]`` in one float dtype: columns multiplied without rounding.
        borders: ``[G + 1]`` int32, where segments of K start and end: multiples of 16, from 0 to K.
    """
    (m, k), n = q.shape, len(weight)
    y = q.new_empty((m, n), dtype=dtype)
    if not m or not n:
        return y
    segments = 1 if borders is None else len(borders) - 1
    matmul_kernel[(triton.cdiv(m, config.m) * triton.cdiv(n, config.n),)](
        q, weight, y, sx, sw, zero, wsum, bias, side, side_weight, borders, m, n, k,
        segments if zero is not None and zero.numel() > 1 else 0, 0 if side is None else side.shape[1],
        segments, config.m, config.n, config.k, config.group, k % config.k == 0,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y
