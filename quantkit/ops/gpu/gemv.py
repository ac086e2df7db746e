"""One token: a product of a vector and the weight, bound by reading the weight. The token is quantized on the way in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.numerics import qmax
from quantkit.ops.gpu.configs import Vector
from quantkit.ops.gpu.matmul import GROWTH, on_grid
from quantkit.ops.gpu.quantize import FLOOR, ROUND, hopper, reachable


@triton.jit
def _dot4(a, b, NATIVE: tl.constexpr):
    """Four products of int8 packed into int32, summed."""
    if NATIVE:
        z = tl.inline_asm_elementwise(
            "{ .reg .s32 z; mov.s32 z, 0; dp4a.s32.s32 $0, $1, $2, z; }", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        z = ((a << 24) >> 24) * ((b << 24) >> 24)
        z += ((a << 16) >> 24) * ((b << 16) >> 24)
        z += ((a << 8) >> 24) * ((b << 8) >> 24)
        z += (a >> 24) * (b >> 24)
    return z


@triton.jit
def _weights(W, n, k, inside, N, K4, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """Words ``[ROWS, B4]``; rows past the end read the last one again."""
    row = (n if EVEN_N else tl.minimum(n, N - 1)).to(tl.int64)
    at = W + row[:, None] * K4 + k[None, :]
    if EVEN_K:
        w = tl.load(at, eviction_policy="evict_first")
    else:
        w = tl.load(at, mask=inside[None, :], other=0, eviction_policy="evict_first")
    return w


@triton.jit
def _scale_and_bias(SW, BIAS, n, N):
    bias = 0.0
    if BIAS is not None:
        bias = tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)
    return tl.load(SW + n, mask=n < N, other=0.0), bias


@triton.jit
def _add(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _of_segments(SW, BORDERS, n, N, SEGMENTS: tl.constexpr):
    """Steps of rows of the weight from each segment to the next, and where segments begin."""
    steps, borders = tl.tuple(()), tl.tuple(())
    for g in tl.static_range(SEGMENTS):
        steps += (tl.load(SW + g * N + tl.minimum(n, N - 1)),)
        borders += (tl.load(BORDERS + g),)
    return steps, borders


@triton.jit
def _of_token(SX, PEAKS, SEGMENTS: tl.constexpr):
    """Steps of the token's scale, its last scale, and what bounds its sums at each border."""
    scales, most, steps, peaks, peak = tl.tuple(()), tl.tuple(()), tl.tuple(()), tl.tuple(()), 0.0
    for g in tl.static_range(SEGMENTS):  # all on their way at once
        scales += (tl.load(SX + g),)
        most += (tl.load(PEAKS + g),)
    for g in tl.static_range(SEGMENTS - 1):
        step = tl.div_rn(scales[g], scales[g + 1])
        step = tl.where(step == step, step, 0.0)  # of a token that becomes NaN
        peak = (peak + most[g]) * (step * GROWTH)
        steps += (step,)
        peaks += (peak,)
    return steps, peaks, scales[SEGMENTS - 1]


@triton.jit
def _chained(products, steps, peaks, w_steps, borders, SEGMENTS: tl.constexpr):
    """Sums of ``products [ROWS, B4]`` in segments, which begin at multiples of 4 words."""
    ROWS: tl.constexpr = products.shape[0]
    B16: tl.constexpr = products.shape[1] // 4
    fours, k = tl.sum(tl.reshape(products, (ROWS, B16, 4)), 2), 16 * tl.arange(0, B16)
    ends = tl.tuple(())  # from the beginning of each segment to the end of all
    for g in tl.static_range(SEGMENTS // 4):
        a, b = tl.where((k < borders[4 * g])[None, :], 0, fours), tl.where((k < borders[4 * g + 1])[None, :], 0, fours)
        c, d = tl.where((k < borders[4 * g + 2])[None, :], 0, fours), tl.where((k < borders[4 * g + 3])[None, :], 0, fours)
        ends += tl.reduce((a, b, c, d), 1, _add)
    for g in tl.static_range(SEGMENTS // 4 * 4, SEGMENTS):
        ends += (tl.sum(tl.where((k < borders[g])[None, :], 0, fours), 1),)
    acc = ends[0] - ends[1]
    for g in tl.static_range(1, SEGMENTS):
        acc = on_grid(acc.to(tl.float32) * steps[g - 1], w_steps[g - 1], peaks[g - 1]) + ends[g]
        if g + 1 < SEGMENTS:
            acc -= ends[g + 1]
    return acc


@triton.jit
def gemv_kernel(
    X, SX, W, Y, SW, BIAS, PRE, BORDERS, PEAKS, N, K, K4, stride_xk,
    SEGMENTS: tl.constexpr, QMAX: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, B4: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``GROUPS`` times ``ROWS`` outputs of ``y [N]`` from ``w [N, K4]`` int32, four codes each, and x: float, or words too."""
    n = tl.program_id(0) * (ROWS * GROUPS) + tl.arange(0, ROWS)
    LAST = SW + (SEGMENTS - 1) * N
    k = tl.arange(0, B4)
    inside = k < K4
    # The weight does not depend on the kernel before: its first part is on the way while that one ends.
    w = _weights(W, n, k, inside, N, K4, EVEN_N, EVEN_K)
    sw, bias = _scale_and_bias(LAST, BIAS, n, N)
    if SEGMENTS > 1:
        w_steps, borders = _of_segments(SW, BORDERS, n, N, SEGMENTS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if SX is not None:
        xq = tl.load(X + k, mask=inside, other=0)
        if SEGMENTS > 1:
            steps, peaks, sx = _of_token(SX, PEAKS, SEGMENTS)
        else:
            sx = tl.load(SX)
    else:
        j = tl.arange(0, 4)
        source = k[:, None] * 4 + j[None, :]
        x = tl.load(X + source * stride_xk, mask=source < K, other=0.0).to(tl.float32)
        if PRE is not None:
            x *= tl.load(PRE + source, mask=source < K, other=0.0)
        top = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)
        absmax = tl.maximum(top.to(tl.float32, bitcast=True), FLOOR)
        limit = absmax * 0.0 + QMAX
        # Where a value is not finite the codes mean nothing, and the scale makes NaN of them.
        sx = tl.where(top < 0x7F800000, tl.div_rn(absmax, limit), float("nan"))
        q = (x * tl.div_rn(limit, absmax) + ROUND).to(tl.int32, bitcast=True) & 255
        xq = tl.sum(q << (8 * j)[None, :], 1)
    xq = tl.broadcast_to(xq[None, :], (ROWS, B4))
    for g in tl.static_range(GROUPS):
        if g + 1 < GROUPS:
            ahead = _weights(W, n + ROWS, k, inside, N, K4, EVEN_N, EVEN_K)
            ahead_sw, ahead_bias = _scale_and_bias(LAST, BIAS, n + ROWS, N)
        products = _dot4(w, xq, NATIVE)
        if SEGMENTS > 1:
            tl.static_assert(GROUPS == 1)
            acc = _chained(products, steps, peaks, w_steps, borders, SEGMENTS)
        else:
            acc = tl.sum(products, 1)
        y = acc.to(tl.float32) * sx * sw
        if BIAS is not None:
            y += bias
        tl.store(Y + n, y.to(Y.dtype.element_ty), mask=n < N)
        n += ROWS
        if g + 1 < GROUPS:
            w, sw, bias = ahead, ahead_sw, ahead_bias


def gemv(
    x: Tensor,
    weight: Tensor,
    sw: Tensor,
    *,
    sx: Tensor | None = None,
    dtype: torch.dtype | None = None,
    bits: int = 8,
    bias: Tensor | None = None,
    pre_scale: Tensor | None = None,
    borders: Tensor | None = None,
    peaks: Tensor | None = None,
    config: Vector,
) -> Tensor:
    """``[1, N]`` in the dtype of ``x [1, K]``, for ``weight [N, padded(K)]`` int8.

    Args:
        sx: ``[1, 1]``, with codes ``x [1, padded(K)]`` in place of floats; the result is then of ``dtype``.
        borders, peaks: with ``sx [1, G]`` and ``sw [G, N]``, of segments of K, see :func:`quantkit.ops.gpu.matmul.matmul`.
    """
    n, words, rows = len(weight), weight.shape[1] // 4, config.rows * config.groups
    x, y = reachable(x), x.new_empty((1, n), dtype=dtype)
    pdl, block = hopper(x.device), triton.next_power_of_2(words)
    gemv_kernel[(triton.cdiv(n, rows),)](
        x if sx is None else x.view(torch.int32), sx, weight.view(torch.int32), y, sw, bias, pre_scale, borders, peaks,
        n, x.shape[1], words, x.stride(1),
        1 if borders is None else len(borders) - 1, qmax(bits), config.rows, config.groups, block,
        n % rows == 0, block == words, x.device.type == "cuda", pdl,
        num_warps=config.warps, enable_fp_fusion=False, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return y
