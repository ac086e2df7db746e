"""Activations to INT8 in one read: (norm or gate,) shift, pre-scale, permutation, rotation, absmax, codes.

One kernel, whose steps are switched on at compile time.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.core.numerics import ABSMAX_FLOOR, FINENESS, qmax
from quantkit.ops.gpu.columns import list_columns, reaching
from quantkit.ops.gpu.configs import padded, padded_side

FLOOR = tl.constexpr(ABSMAX_FLOOR)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds half to even and leaves the integer in the low bits
EXPONENT = tl.constexpr(0x7F800000)  # absolute bit patterns from here on are Inf and NaN, which float maxima would drop
FINE = tl.constexpr(FINENESS)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def whole(x):
    """The nearest integer to a float below 2**22 in size, in two quick instructions; the one that converts takes longer."""
    return (x + ROUND).to(tl.int32, bitcast=True) - 0x4B400000  # the bits of ROUND


@triton.jit
def _of_each(x, cluster, CLUSTERS: tl.constexpr):
    """The largest of ``x [R]``, none below 0, in each cluster ``[CLUSTERS]``."""
    mine = cluster[:, None] == tl.arange(0, CLUSTERS)[None, :]
    return tl.max(tl.where(mine, x[:, None], 0), 0)


@triton.jit
def _spread(values, cluster, CLUSTERS: tl.constexpr):
    """``values [CLUSTERS]`` for rows ``[R]`` of clusters, 0 for those of none."""
    mine = cluster[:, None] == tl.arange(0, CLUSTERS)[None, :]
    return tl.max(tl.where(mine, values[None, :], 0.0), 1)


@triton.jit
def _shared(scale, SHARES, COUNT: tl.constexpr, CLUSTERS: tl.constexpr):
    """numerics.shared: unit and multiples ``[CLUSTERS]``."""
    g = tl.arange(0, CLUSTERS)
    terms = scale * tl.load(SHARES + g, mask=g < COUNT, other=0.0)
    top = tl.max(terms, 0)
    parts = tl.ceil(tl.div_rn(terms, tl.zeros([CLUSTERS], tl.float32) + top) * FINE).to(tl.int32)
    unit = tl.sum(parts, 0).to(tl.float32) * (1 / FINE) * top
    steps = tl.ceil((tl.div_rn(scale, tl.zeros([CLUSTERS], tl.float32) + unit) - 1.0) * 0.5)
    return unit, tl.maximum(2.0 * steps + 1.0, 1.0)


@triton.jit
def _spread_inverse(unit, multiple, cluster, CLUSTERS: tl.constexpr):
    """``1 / scale`` for rows of clusters, 0 for those of none."""
    scale = unit * multiple
    return _spread(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), cluster, CLUSTERS)


@triton.jit
def _magnitude(x, CLUSTERS: tl.constexpr):
    """Bits of the largest absolute value of each row ``[R]``, and whether the row is finite, or with clusters all of them."""
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    if CLUSTERS > 1:
        finite = (tl.max(top, 0) < EXPONENT) & (top >= 0)
    else:
        finite = top < EXPONENT
    return top, finite


@triton.jit
def _symmetric(x, cluster, SHARES, QMAX: tl.constexpr, COUNT: tl.constexpr, CLUSTERS: tl.constexpr):
    """Codes and scale of rows ``x [R, B]`` float32, padded with 0: numerics.encode and absmax_scale, bit for bit. With clusters
    the scale is a unit, and multiples come third."""
    top, finite = _magnitude(x, CLUSTERS)
    absmax = tl.where(finite, top, 0).to(tl.float32, bitcast=True)
    if CLUSTERS > 1:
        absmax = tl.maximum(_of_each(absmax, cluster, CLUSTERS), FLOOR)
        limit = tl.full(absmax.shape, QMAX, tl.float32)
        scale, multiple = _shared(tl.div_rn(absmax, limit), SHARES, COUNT, CLUSTERS)
        inverse = _spread_inverse(scale, multiple, cluster, CLUSTERS)
    else:
        absmax = tl.maximum(absmax, FLOOR)
        limit = tl.full(absmax.shape, QMAX, tl.float32)
        scale, inverse, multiple = tl.div_rn(absmax, limit), tl.div_rn(limit, absmax), absmax
    q = (x * inverse[:, None] + ROUND).to(tl.int32, bitcast=True)
    return tl.where(finite[:, None], q, 0).to(tl.int8), scale, multiple, finite


@triton.jit
def _asymmetric(x, cluster, SHARES, QMAX: tl.constexpr, COUNT: tl.constexpr, CLUSTERS: tl.constexpr):
    """Codes, scale and zero of rows ``x [R, B]``, padded with 0: numerics.encode_asymmetric and range_scale. With clusters the
    scale is a unit, and multiples come third."""
    _, finite = _magnitude(x, CLUSTERS)
    x = tl.where(finite[:, None], x, 0.0)
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    if CLUSTERS > 1:
        low, high = -_of_each(-low, cluster, CLUSTERS), _of_each(high, cluster, CLUSTERS)
    scale = tl.div_rn(tl.maximum(high - low, FLOOR), tl.full(low.shape, 2 * QMAX + 1, tl.float32))
    multiple = scale
    if CLUSTERS > 1:
        finite = finite & (tl.min((scale < float("inf")).to(tl.int32), 0) > 0)
        scale = tl.where(scale < float("inf"), scale, 1.0)
        scale, multiple = _shared(scale, SHARES, COUNT, CLUSTERS)
        low = -_spread(-low, cluster, CLUSTERS)
        own = tl.where(finite & (cluster >= 0), _spread(scale * multiple, cluster, CLUSTERS), 1.0)
    else:
        finite = finite & (scale < float("inf"))
        own = tl.where(finite, scale, 1.0)
    zero = whole(-(QMAX + 1) - tl.div_rn(tl.where(finite, low, 0.0), own))
    v = x * tl.div_rn(tl.full(low.shape, 1.0, tl.float32), own)[:, None]
    q = whole(tl.where(finite[:, None], v, 0.0)) + zero[:, None]
    q = tl.minimum(tl.maximum(q, -QMAX - 1), QMAX)
    q = tl.where(finite[:, None], q, 0)
    return q.to(tl.int8), scale, tl.where(finite, zero, 0), multiple, finite


@triton.jit
def _static(x, scale, zero, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, CLUSTERS: tl.constexpr):
    """Codes of rows ``x [R, B]`` for a given ``scale [R]`` and ``zero [R]``, and which rows are finite."""
    _, finite = _magnitude(x, CLUSTERS)
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
    """Blocks of ``x [R, B]`` times a Hadamard matrix: sums and differences, as :meth:`quantkit.core.transform.Rotation.apply`."""
    x = x * (1.0 / BLOCK**0.5)
    for i in tl.static_range(20):  # Triton holds at most 2**20 elements in a tensor
        if 2 << i <= BLOCK:
            a, b = tl.split(tl.permute(tl.reshape(x, (R * B // (2 << i), 2, 1 << i)), (0, 2, 1)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (R, B))
    return x


@triton.jit
def gated(x, x2, SOURCE: tl.constexpr):
    """``silu(x) * x2`` or ``gelu(x) * x2``."""
    if SOURCE == "silu":
        y = x / (1.0 + tl.exp(-x)) * x2
    elif SOURCE == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF)) * x2
    else:  # tanh(t) = 1 - 2 / (exp(2 t) + 1)
        t = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = 0.5 * x * (2.0 - 2.0 / (tl.exp(2.0 * t) + 1.0)) * x2
    return y


@triton.jit
def quantize_kernel(
    X, X2, GAIN, BIAS, SHIFT, PRE, PERM, SIDE_INDEX, SIDE_MASK, IN_SCALE, IN_ZERO, CLUSTER, SHARES,
    Q, S, Z, SIDE, SUM, REACHED, M, K, places, padded, stride_xm, stride_xk, stride_2m, stride_2k, side_count, side_stride, eps,
    offset, threshold,
    SOURCE: tl.constexpr, QMAX: tl.constexpr, SYMMETRIC: tl.constexpr, ROTATION: tl.constexpr, SIDES: tl.constexpr,
    CLUSTERS: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr, B: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """R rows of K channels, in tiles of ``[R, B]``; see :func:`quantize` for the arguments.

    With clusters, R is 1, and the row is worked on as ``[B / 16, 16]`` from where ranges are looked for.
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
    cluster = tl.zeros([R], tl.int32)
    at, store = row, row < M
    if CLUSTERS > 1:
        x = tl.reshape(x, (B // 16, 16))
        tile = tl.arange(0, B // 16)
        cluster = tl.load(CLUSTER + tile, mask=tile < padded // 16, other=-1)
        at, store = tl.program_id(0).to(tl.int64) * COUNT + cluster, cluster >= 0  # tiles of a cluster write the same
        g = tl.arange(0, CLUSTERS)
    if IN_SCALE is not None:
        zero = cluster
        if IN_ZERO is not None:
            zero = tl.load(IN_ZERO + cluster, mask=store, other=0)
        scale = tl.load(IN_SCALE)
        own = tl.full([R], 1.0, tl.float32) * scale
        if CLUSTERS > 1:
            multiple = tl.load(IN_SCALE + 1 + g, mask=g < COUNT, other=1.0)
            own = scale * tl.load(IN_SCALE + 1 + cluster, mask=store, other=1.0)
        q, finite = _static(x, own, zero, QMAX, SYMMETRIC, CLUSTERS)
    elif SYMMETRIC:
        q, scale, multiple, finite = _symmetric(x, cluster, SHARES, QMAX, COUNT, CLUSTERS)
    else:
        q, scale, zero, multiple, finite = _asymmetric(x, cluster, SHARES, QMAX, COUNT, CLUSTERS)
        tl.store(Z + at, zero, mask=store)
    if CLUSTERS > 1:
        whole = tl.min(finite.to(tl.int32), 0) > 0
        at = tl.program_id(0).to(tl.int64) * (1 + COUNT)
        tl.store(S + at, tl.where(whole, scale, float("nan")))
        tl.store(S + at + 1 + g, tl.where(whole, multiple, 1.0), mask=g < COUNT)
    else:
        tl.store(S + row, tl.where(finite, scale, float("nan")), mask=row < M)
    q = tl.reshape(q, (R, B))
    out = Q + row[:, None] * padded + k[None, :]
    if EVEN:
        tl.store(out, q)
    else:
        tl.store(out, q, mask=(row < M)[:, None] & (k < padded)[None, :])


def with_unit(count: int) -> int:
    """Columns of a scale of ``count`` clusters."""
    return 1 if count == 1 else 1 + count


def reachable(x: Tensor) -> Tensor:
    """``x``, copied where offsets along a row would leave the 32 bits in which the kernels count them."""
    return x if x.stride(1) * x.shape[1] < 2**31 else x.contiguous()


def quantize(
    x: Tensor,
    *,
    bits: int = 8,
    symmetric: bool = True,
    source: str = "",
    x2: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    shift: Tensor | None = None,
    pre_scale: Tensor | None = None,
    permutation: Tensor | None = None,
    rotation: int = 0,
    side_index: Tensor | None = None,
    side_mask: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_zero: Tensor | None = None,
    clusters: Tensor | None = None,
    shares: Tensor | None = None,
    align: int = 16,
    threshold: float = 0.0,
    warps: int = 0,
) -> list[Tensor]:
    """INT8 codes of rows in one launch.

    Args:
        x: ``[M, K]`` float, any strides.
        bits, symmetric: number format.
        source: "" (x itself), "rms" or "layer" (norm of x, or of x + x2), "silu", "gelu" or "gelu_tanh" (of x, times x2).
        x2: ``[M, K]``: the residual of a norm, or the other factor of a gate.
        gain, bias, eps, offset: of the norm: ``norm(x) * (gain + offset) + bias``.
        shift, permutation, side_index: as :class:`quantkit.W8A8Linear` keeps them; the channels of ``side_index`` go to the
            side product as they are after the shift.
        pre_scale: ``[K]`` float32, by which channels are multiplied, the signs of a rotation included.
        rotation: channels of a block; 0 for none.
        side_mask: ``[K]`` int8, 1 at the channels of ``side_index``, which are 0 in the codes.
        in_scale, in_zero: static scale ``[1]`` (``[1 + G]``) and zero point ``[1]`` (``[G]``); left out, a token gets its own.
        clusters, shares: with G > 1 clusters of channels, ``[P / 16]`` int32, to which of them each 16 of the P codes of a row
            belong, and ``[G]`` float32, :func:`quantkit.core.numerics.shares`. ``permutation`` is then ``[P]``, -1 where a code is
            padding.
        align: what the borders of clusters are multiples of.
        threshold: finite elements that reach it are 0 in the codes, and do not count for the scale; 0 for none.
        warps: of each program; 0 decides by K.

    Returns:
        codes ``[M, padded(K)]`` or ``[M, P]`` int8 (the weight must be 0 where they are padding) and scale ``[M, 1]`` float32
        (``[M, 1 + G]``, :func:`quantkit.core.numerics.shared`); then, where asked for, zero ``[M, 1]`` (``[M, G]``) int32, side
        columns ``[M, padded_side(n)]`` and the sum ``x + x2`` ``[M, K]``, both in the dtype of x, and ``[1 + K]`` int32, how
        many columns reached the threshold anywhere and which, ascending (see :mod:`.columns`).

    Raises:
        ValueError: a source and side columns, which would be taken from before the norm or gate.
    """
    if source and side_index is not None:
        raise ValueError(f"source={source!r} cannot be fused where side columns are taken: apply it before quantize")
    m, k = x.shape
    x, x2 = reachable(x), x2 if x2 is None else reachable(x2)
    width, count = (padded(k), 1) if clusters is None or shares is None else (16 * len(clusters), len(shares))
    places = k if clusters is None else width
    q, scale = x.new_empty((m, width), dtype=torch.int8), x.new_empty((m, with_unit(count)), dtype=torch.float32)
    zero = None if symmetric or in_scale is not None else x.new_empty((m, count), dtype=torch.int32)
    columns = 0 if side_index is None else len(side_index)
    sides = padded_side(columns)
    side = x.new_empty((m, sides)) if sides else None
    kept = x.new_empty((m, k)) if x2 is not None and source in ("rms", "layer") else None
    reached = x.new_zeros(k, dtype=torch.int32) if threshold else None
    done = [t for t in (q, scale, zero, side, kept) if t is not None]
    if not m:
        return done if reached is None else [*done, list_columns(reached, pdl=False)]
    block = max(triton.next_power_of_2(places), 16)  # at least padded(k)
    rows = 1 if clusters is not None else max(1, 1024 // block)
    pdl, strides2 = hopper(x.device), (0, 0) if x2 is None else x2.stride()
    quantize_kernel[(triton.cdiv(m, rows),)](
        x, x2, gain, bias, shift, pre_scale, permutation, side_index, side_mask, in_scale, in_zero, clusters, shares,
        q, scale, zero, side, kept, reached, m, k, places, width, *x.stride(), *strides2, columns,
        sides, eps, offset, threshold, source, qmax(bits), symmetric, rotation,
        triton.next_power_of_2(sides) if sides else 0, triton.next_power_of_2(count), count, rows, block,
        rows == 1 and block == k == places, pdl,
        num_warps=warps or min(max(rows * block // 512, 4), 16), enable_fp_fusion=False,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return done if reached is None else [*done, list_columns(reached, pdl)]


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether a kernel may start before the one it depends on has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
