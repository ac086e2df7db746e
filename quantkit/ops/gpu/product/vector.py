"""Device code, in Triton, for one token: a product of a vector and the weight, as fast as the weight can be read.

The token comes as codes, or in floating point and is quantized on the way in.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.ops.gpu.numbers import FLOOR, ROUND, whole


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
def _group_of(borders, places):
    """Which group ``places`` are in."""
    group = tl.zeros_like(places)
    for g in tl.static_range(1, len(borders)):
        group += (places >= borders[g]).to(tl.int32)
    return group


@triton.jit
def gemv_kernel(
    X, SX, W, Y, SW, BIAS, PRE, BORDERS, N, K, K4, stride_xk,
    GROUPS: tl.constexpr, BY_ROW: tl.constexpr, QMAX: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr,
    B4: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``ROUNDS`` times ``ROWS`` outputs of ``y [N]`` from ``w [N, K4]`` int32, four codes each, and x: float, or words too."""
    n = tl.program_id(0) * (ROWS * ROUNDS) + tl.arange(0, ROWS)
    k = tl.arange(0, B4)
    inside = k < K4
    borders = tl.tuple(())
    for g in tl.static_range(GROUPS if GROUPS > 1 else 0):
        borders += (tl.load(BORDERS + g),)
    # The weight does not depend on the kernel before: its first part is on the way while that one ends.
    w = _weights(W, n, k, inside, N, K4, EVEN_N, EVEN_K)
    if PDL:
        gdc_launch_dependents()  # which also keeps the compiler from loading anything else before
    sw, bias = _scale_and_bias(SW, BIAS, n, N)
    if GROUPS > 1:
        tl.static_assert(ROUNDS == 1)
        # they begin at multiples of 16 places: four words count alike
        group = _group_of(borders, 16 * tl.arange(0, B4 // 4))
    if BY_ROW:
        # (^ 0: were rows known to be neighbours, the compiler would give threads others than those whose weights they have)
        row = (n if EVEN_N else tl.minimum(n, N - 1)) ^ borders[0]
        row_multipliers = tl.trans(tl.load(SW + (1 + group)[:, None] * N + row[None, :]))
    if PDL:
        gdc_wait()
    if SX is not None:
        xq = tl.load(X + k, mask=inside, other=0)
        sx = tl.load(SX)
        if GROUPS > 1:
            multiplier = whole(tl.load(SX + 1 + group))[None, :]
            if BY_ROW:
                multiplier *= whole(row_multipliers)
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
    for g in tl.static_range(ROUNDS):
        if g + 1 < ROUNDS:
            ahead = _weights(W, n + ROWS, k, inside, N, K4, EVEN_N, EVEN_K)
            ahead_sw, ahead_bias = _scale_and_bias(SW, BIAS, n + ROWS, N)
        products = _dot4(w, xq, NATIVE)
        if GROUPS > 1:
            products = tl.sum(products.reshape(ROWS, B4 // 4, 4), 2) * multiplier
        acc = tl.sum(products, 1)
        y = acc.to(tl.float32) * sx * sw
        if BIAS is not None:
            y += bias
        tl.store(Y + n, y.to(Y.dtype.element_ty), mask=n < N)
        n += ROWS
        if g + 1 < ROUNDS:
            w, sw, bias = ahead, ahead_sw, ahead_bias
