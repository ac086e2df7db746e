"""Device code, in Triton, that turns activations into INT8 codes: one kernel for everything that can be asked.

Each step (norm or gate, shift, pre-scale, permutation, rotation, scale, codes) is switched on when the kernel is compiled. It
runs wherever Triton does, and gives exactly the codes and scales of :mod:`quantkit.ops.reference`, but for the last bit of
norms, gates and rotations. :mod:`.rows` and :mod:`.order` are faster for what is common.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.ops.gpu.codes.gates import gated
from quantkit.ops.gpu.codes.reached import reaching
from quantkit.ops.gpu.numbers import EXPONENT, FINE, FLOOR, ROUND, whole


@triton.jit
def _of_each(x, group, GROUPS: tl.constexpr):
    """The largest of ``x [R]``, none below 0, in each group ``[GROUPS]``."""
    mine = group[:, None] == tl.arange(0, GROUPS)[None, :]
    return tl.max(tl.where(mine, x[:, None], 0), 0)


@triton.jit
def _spread(values, group, GROUPS: tl.constexpr):
    """``values [GROUPS]`` for rows ``[R]`` of groups, 0 for those of none."""
    mine = group[:, None] == tl.arange(0, GROUPS)[None, :]
    return tl.max(tl.where(mine, values[None, :], 0.0), 1)


@triton.jit
def _shared(scale, SHARES, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """Base scale and multipliers ``[GROUPS]`` of what needs ``scale``; see :func:`quantkit.core.groups.with_multipliers`."""
    g = tl.arange(0, GROUPS)
    terms = scale * tl.load(SHARES + g, mask=g < COUNT, other=0.0)
    top = tl.max(terms, 0)
    parts = tl.ceil(tl.div_rn(terms, tl.zeros([GROUPS], tl.float32) + top) * FINE).to(tl.int32)
    base = tl.sum(parts, 0).to(tl.float32) * (1 / FINE) * top
    steps = tl.ceil((tl.div_rn(scale, tl.zeros([GROUPS], tl.float32) + base) - 1.0) * 0.5)
    return base, tl.maximum(2.0 * steps + 1.0, 1.0)


@triton.jit
def _spread_inverse(base, multiplier, group, GROUPS: tl.constexpr):
    """``1 / scale`` for rows of groups, 0 for those of none."""
    scale = base * multiplier
    return _spread(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), group, GROUPS)


@triton.jit
def _magnitude(x, GROUPS: tl.constexpr):
    """Bits of the largest absolute value of each row ``[R]``, and whether the row is finite, or with groups all of them."""
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    if GROUPS > 1:
        finite = (tl.max(top, 0) < EXPONENT) & (top >= 0)
    else:
        finite = top < EXPONENT
    return top, finite


@triton.jit
def _symmetric(x, group, SHARES, QMAX: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """Codes and scale of rows ``x [R, B]`` float32, padded with 0: numerics.encode and absmax_scale, bit for bit. With groups
    the scale is a base scale, and multipliers come third."""
    top, finite = _magnitude(x, GROUPS)
    absmax = tl.where(finite, top, 0).to(tl.float32, bitcast=True)
    if GROUPS > 1:
        absmax = tl.maximum(_of_each(absmax, group, GROUPS), FLOOR)
        limit = tl.full(absmax.shape, QMAX, tl.float32)
        scale, multiplier = _shared(tl.div_rn(absmax, limit), SHARES, COUNT, GROUPS)
        inverse = _spread_inverse(scale, multiplier, group, GROUPS)
    else:
        absmax = tl.maximum(absmax, FLOOR)
        limit = tl.full(absmax.shape, QMAX, tl.float32)
        scale, inverse, multiplier = tl.div_rn(absmax, limit), tl.div_rn(limit, absmax), absmax
    q = (x * inverse[:, None] + ROUND).to(tl.int32, bitcast=True)
    return tl.where(finite[:, None], q, 0).to(tl.int8), scale, multiplier, finite


@triton.jit
def _asymmetric(x, group, SHARES, QMAX: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """Codes, scale and zero of rows ``x [R, B]``, padded with 0: numerics.encode_asymmetric and range_scale. With groups the
    scale is a base scale, and multipliers come third."""
    _, finite = _magnitude(x, GROUPS)
    x = tl.where(finite[:, None], x, 0.0)
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    if GROUPS > 1:
        low, high = -_of_each(-low, group, GROUPS), _of_each(high, group, GROUPS)
    scale = tl.div_rn(tl.maximum(high - low, FLOOR), tl.full(low.shape, 2 * QMAX + 1, tl.float32))
    multiplier = scale
    if GROUPS > 1:
        finite = finite & (tl.min((scale < float("inf")).to(tl.int32), 0) > 0)
        scale = tl.where(scale < float("inf"), scale, 1.0)
        scale, multiplier = _shared(scale, SHARES, COUNT, GROUPS)
        low = -_spread(-low, group, GROUPS)
        own = tl.where(finite & (group >= 0), _spread(scale * multiplier, group, GROUPS), 1.0)
    else:
        finite = finite & (scale < float("inf"))
        own = tl.where(finite, scale, 1.0)
    zero = whole(-(QMAX + 1) - tl.div_rn(tl.where(finite, low, 0.0), own))
    v = x * tl.div_rn(tl.full(low.shape, 1.0, tl.float32), own)[:, None]
    q = whole(tl.where(finite[:, None], v, 0.0)) + zero[:, None]
    q = tl.minimum(tl.maximum(q, -QMAX - 1), QMAX)
    q = tl.where(finite[:, None], q, 0)
    return q.to(tl.int8), scale, tl.where(finite, zero, 0), multiplier, finite


@triton.jit
def _static(x, scale, zero, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, GROUPS: tl.constexpr):
    """Codes of rows ``x [R, B]`` for a given ``scale [R]`` and ``zero [R]``, and which rows are finite."""
    _, finite = _magnitude(x, GROUPS)
    v = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    v = tl.where(finite[:, None], v, 0.0)
    if SYMMETRIC:
        q = whole(tl.minimum(tl.maximum(v, -QMAX), QMAX))  # clamping to integers commutes with rounding
    else:
        q = whole(tl.minimum(tl.maximum(v, -4.0 * QMAX), 4.0 * QMAX)) + zero[:, None]
        q = tl.minimum(tl.maximum(q, -QMAX - 1), QMAX)
        q = tl.where(finite[:, None], q, 0)
    return q.to(tl.int8), finite


@triton.jit
def _rotate(x, BLOCK: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """Blocks of ``x [R, B]`` times a Hadamard matrix: sums and differences, as the reference does it."""
    x = x * (1.0 / BLOCK**0.5)
    for i in tl.static_range(20):  # Triton holds at most 2**20 elements in a tensor
        if 2 << i <= BLOCK:
            a, b = tl.split(tl.permute(tl.reshape(x, (R * B // (2 << i), 2, 1 << i)), (0, 2, 1)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (R, B))
    return x


@triton.jit
def quantize_kernel(
    X, X2, GAIN, BIAS, SHIFT, PRE, PERM, SIDE_INDEX, SIDE_MASK, IN_SCALE, IN_ZERO, GROUP, SHARES,
    Q, S, Z, SIDE, SUM, REACHED, M, K, places, padded, stride_xm, stride_xk, stride_2m, stride_2k, side_count, side_stride, eps,
    offset, threshold,
    SOURCE: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, ROTATION: tl.constexpr, SIDES: tl.constexpr,
    GROUPS: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows of K channels, in tiles of ``[R, B]``; see :class:`.request.CodesRequest` for the arguments.

    With groups, R is 1, and the row is worked on as ``[B / 16, 16]`` from where ranges are looked for.
    """
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    k = tl.arange(0, B)
    real = k < places
    source = k
    if PERM is not None:
        source = tl.load(PERM + k, mask=real, other=-1).to(tl.int32)
        real = source >= 0
    inside = (row < M)[:, None] & real[None, :]
    at = row[:, None] * stride_xm + source[None, :] * stride_xk
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # A whole row needs no mask, which keeps its loads wide.
    x = (tl.load(X + at) if EVEN else tl.load(X + at, mask=inside, other=0.0)).to(tl.float32)
    if X2 is not None:
        at = row[:, None] * stride_2m + source[None, :] * stride_2k
        x2 = (tl.load(X2 + at) if EVEN else tl.load(X2 + at, mask=inside, other=0.0)).to(tl.float32)
        if SOURCE == "rms" or SOURCE == "layer":  # after a residual: the sum is kept, in its own dtype
            kept = (x + x2).to(SUM.dtype.element_ty)
            tl.store(SUM + row[:, None] * K + source[None, :], kept, mask=inside)
            x = kept.to(tl.float32)
        else:
            x = gated(x, x2, SOURCE)
    if SOURCE == "rms" or SOURCE == "layer":
        if SOURCE == "layer":
            mean = tl.sum(x, 1) / K
            x = tl.where(inside, x - mean[:, None], 0.0)
        x = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / K + eps))[:, None]
        if GAIN is not None:
            x = x * (tl.load(GAIN + source, mask=real, other=0.0).to(tl.float32) + offset)[None, :]
        if BIAS is not None:
            x = x + tl.load(BIAS + source, mask=real, other=0.0).to(tl.float32)[None, :]
    if SHIFT is not None:
        x = x - tl.load(SHIFT + source, mask=real, other=0.0)[None, :]
    if SIDES > 0:  # outlier columns leave in the dtype of x, before the scale
        n = tl.arange(0, SIDES)
        some = n < side_count  # and zeros up to the width of a tile
        column = tl.load(SIDE_INDEX + n, mask=some, other=0)
        side = tl.load(
            X + row[:, None] * stride_xm + column[None, :] * stride_xk, mask=(row < M)[:, None] & some[None, :], other=0.0
        ).to(tl.float32)
        if SHIFT is not None:
            side = side - tl.load(SHIFT + column, mask=some, other=0.0)[None, :]
        side = tl.where(tl.abs(side) < float("inf"), side, float("nan"))  # a product of floats could leave an infinity as it is
        there = (row < M)[:, None] & (n < side_stride)[None, :]
        tl.store(SIDE + row[:, None] * side_stride + n[None, :], side.to(SIDE.dtype.element_ty), mask=there)
    if SIDE_MASK is not None:  # a byte a channel: the index itself would be searched for every channel
        x = tl.where((tl.load(SIDE_MASK + source, mask=real, other=0) != 0)[None, :], 0.0, x)
    if PRE is not None:
        x = x * tl.load(PRE + source, mask=real, other=0.0)[None, :]
    if ROTATION > 0:
        x = _rotate(x, ROTATION, R, B)
    if REACHED is not None:
        large = reaching(x, threshold)
        tl.store(REACHED + k[None, :] + tl.zeros([R, 1], tl.int32), 1, mask=large)  # many programs write the same
        x = tl.where(large, 0.0, x)
    group = tl.zeros([R], tl.int32)
    at, store = row, row < M
    if GROUPS > 1:
        x = tl.reshape(x, (B // 16, 16))
        tile = tl.arange(0, B // 16)
        group = tl.load(GROUP + tile, mask=tile < padded // 16, other=-1)
        at, store = tl.program_id(0).to(tl.int64) * COUNT + group, group >= 0  # tiles of a group write the same
        g = tl.arange(0, GROUPS)
    if IN_SCALE is not None:
        zero = group
        if IN_ZERO is not None:
            zero = tl.load(IN_ZERO + group, mask=store, other=0)
        scale = tl.load(IN_SCALE)
        own = tl.full([R], 1.0, tl.float32) * scale
        if GROUPS > 1:
            multiplier = tl.load(IN_SCALE + 1 + g, mask=g < COUNT, other=1.0)
            own = scale * tl.load(IN_SCALE + 1 + group, mask=store, other=1.0)
        q, finite = _static(x, own, zero, QMAX, SYMMETRIC, GROUPS)
    elif SYMMETRIC:
        q, scale, multiplier, finite = _symmetric(x, group, SHARES, QMAX, COUNT, GROUPS)
    else:
        q, scale, zero, multiplier, finite = _asymmetric(x, group, SHARES, QMAX, COUNT, GROUPS)
        tl.store(Z + at, zero, mask=store)
    if GROUPS > 1:
        whole = tl.min(finite.to(tl.int32), 0) > 0
        at = tl.program_id(0).to(tl.int64) * (1 + COUNT)
        tl.store(S + at, tl.where(whole, scale, float("nan")))
        tl.store(S + at + 1 + g, tl.where(whole, multiplier, 1.0), mask=g < COUNT)
    else:
        tl.store(S + row, tl.where(finite, scale, float("nan")), mask=row < M)
    q = tl.reshape(q, (R, B))
    out = Q + row[:, None] * padded + k[None, :]
    if EVEN:
        tl.store(out, q)
    else:
        tl.store(out, q, mask=(row < M)[:, None] & (k < padded)[None, :])
