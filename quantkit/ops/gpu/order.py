"""Channels put in order on the way to INT8, after a norm or not, at the speed of memory, in Gluon.

An order is a gather, and shared memory serves one only a few elements at a time, as many lie in the same bank. So a program
takes two rows of 16 bit at once: a word of shared memory holds one channel of both, and one gather moves them together.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.numerics import qmax
from quantkit.ops.gpu.configs import PROCESSORS, padded
from quantkit.ops.gpu.quantize import FLOOR, ROUND, hopper
from quantkit.ops.gpu.rows import LEAST, LINE, MOST_CLUSTERS, by_cluster, larger, low_bytes, of_lines, ranges, read

WIDTH = gl.constexpr(LINE)
LARGEST = 2**13
"""Channels of a row: two longer ones do not fit the registers."""


@gluon.constexpr_function
def beside(g: int, warps: int) -> gl.DistributedLinearLayout:
    """How ``[g, 64]`` is spread: 8 channels beside each other a thread, 8 threads along a line, 4 lines a warp."""
    rest = [[4 * warps << i, 0] for i in range((g // (4 * warps)).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *rest],
        [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]],
        [[4 << i, 0] for i in range(warps.bit_length() - 1)],
        [],
        [g, 64],
    )


@gluon.jit
def both_larger(a, b, c, d):
    return larger(a, c), larger(b, d)


@gluon.jit
def sums_and_larger(s, t, a, b, u, v, c, d):
    return s + u, t + v, larger(a, c), larger(b, d)


@gluon.jit
def put(Q, S, row, M, k, x, top, tops, factor, cluster, c, REACH, padded, QMAX: gl.constexpr, CLUSTERS: gl.constexpr,
        COUNT: gl.constexpr, EVEN: gl.constexpr):  # fmt: skip
    """Codes and scales of a row ``x [G, 64]``, times ``factor``, whose largest absolute value is ``top``, in clusters ``tops``."""
    layout: gl.constexpr = x.type.layout
    finite = (gl.abs(top) < float("inf")) & (gl.abs(top) * factor < float("inf"))
    if CLUSTERS > 1:
        absmax = ranges(tops, cluster, c, REACH, finite, factor, COUNT)
        limit = gl.full_like(absmax, 1.0 * QMAX)
        inverse = gl.convert_layout(gl.div_rn(limit, absmax), gl.SliceLayout(1, layout))[:, None] * factor
        scale = gl.where(finite, gl.div_rn(absmax, limit), float("nan"))
        gl.store(S + row.to(gl.int64) * COUNT + cluster, scale, mask=(cluster >= 0) & (row < M))
    else:
        absmax, limit = gl.maximum(gl.abs(top) * factor, FLOOR), gl.to_tensor(1.0 * QMAX)
        inverse = gl.div_rn(limit, absmax) * factor
        gl.store(S + row, gl.where(finite, gl.div_rn(absmax, limit), float("nan")), mask=row < M)
    v = x * inverse + ROUND
    q = low_bytes(v, gl.full_like(v.to(gl.int32, bitcast=True), gl.where(finite, -1, 0)))
    gl.store(Q + row.to(gl.int64) * padded + k, q, mask=(row < M) & (k >= 0) if EVEN else (row < M) & (k < padded))


@gluon.jit
def order_kernel(X, X2, GAIN, PRE, PERM, CLUSTER, REACH, Q, S, SUM, M, K, padded, stride_x, stride_2, eps, offset,
                 SOURCE: gl.constexpr, QMAX: gl.constexpr, CLUSTERS: gl.constexpr, COUNT: gl.constexpr, B: gl.constexpr,
                 EVEN: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Two rows of K channels at a time; see :func:`quantkit.ops.gpu.quantize.quantize` for the arguments."""
    G: gl.constexpr = B // WIDTH
    layout: gl.constexpr = beside(G, gl.num_warps())
    g, j = gl.arange(0, G, gl.SliceLayout(1, layout)), gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    k = g[:, None] * WIDTH + j[None, :]
    # The vectors do not depend on the kernel before: they are on the way while that one ends.
    perm = gl.load(PERM + k, mask=k < (padded if CLUSTERS > 1 else K), other=-1).to(gl.int32)
    perm = gl.where(perm < 0, K, perm)  # where there is padding, channel K is 0
    cluster, c = g, g
    if CLUSTERS > 1:
        small: gl.constexpr = by_cluster(layout, CLUSTERS)
        c, line = gl.arange(0, CLUSTERS, gl.SliceLayout(0, small))[None, :], gl.arange(0, G, gl.SliceLayout(1, small))
        cluster = gl.load(CLUSTER + line * (WIDTH // 16), mask=line * WIDTH < padded, other=-1)
    if PRE is not None:
        pre = gl.load(PRE + perm, mask=perm < K, other=0.0)
    if GAIN is not None:
        gain = gl.load(GAIN + perm, mask=perm < K, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first, step = 2 * gl.program_id(0), 2 * gl.num_programs(0)
    # Without a residual there are registers for the next two rows, while these are worked on.
    if X2 is None:
        a_ahead, b_ahead = read(X, first, M, stride_x, k, K, EVEN), read(X, first + 1, M, stride_x, k, K, EVEN)
    for row in range(first, M, step):
        if X2 is None:
            a, b = a_ahead, b_ahead
            a_ahead, b_ahead = read(X, row + step, M, stride_x, k, K, EVEN), read(X, row + step + 1, M, stride_x, k, K, EVEN)
        else:
            a, b = read(X, row, M, stride_x, k, K, EVEN), read(X, row + 1, M, stride_x, k, K, EVEN)
            a2, b2 = read(X2, row, M, stride_2, k, K, EVEN), read(X2, row + 1, M, stride_2, k, K, EVEN)
            a = (a.to(gl.float32) + a2.to(gl.float32)).to(SUM.dtype.element_ty)
            b = (b.to(gl.float32) + b2.to(gl.float32)).to(SUM.dtype.element_ty)
            out = SUM + row.to(gl.int64) * K + k
            gl.store(out, a, mask=k < K)
            gl.store(out + K, b, mask=(k < K) & (row + 1 < M))
        word = a.to(gl.uint16, bitcast=True).to(gl.uint32) | (b.to(gl.uint16, bitcast=True).to(gl.uint32) << 16)
        word = gl.gather(word.reshape([B]), perm.reshape([B]), 0).reshape([G, WIDTH])
        a = word.to(gl.uint16).to(a.dtype, bitcast=True).to(gl.float32)
        b = (word >> 16).to(gl.uint16).to(b.dtype, bitcast=True).to(gl.float32)
        if SOURCE == "rms":
            squares_a, squares_b = (a * a).reshape([B]), (b * b).reshape([B])
        if GAIN is not None:
            scale = gain.to(gl.float32) + offset
            a, b = a * scale, b * scale
        if PRE is not None:
            a, b = a * pre, b * pre
        flat_a, flat_b, factor_a, factor_b, tops_a, tops_b = a.reshape([B]), b.reshape([B]), 1.0, 1.0, 0.0, 0.0
        if SOURCE == "rms":  # the root commutes with all that follows it
            sum_a, sum_b, top_a, top_b = gl.reduce((squares_a, squares_b, flat_a, flat_b), 0, sums_and_larger)
            factor_a, factor_b = 1.0 / gl.sqrt_rn(sum_a / K + eps), 1.0 / gl.sqrt_rn(sum_b / K + eps)
        else:
            top_a, top_b = gl.reduce((flat_a, flat_b), 0, both_larger)
        if CLUSTERS > 1:
            tops_a, tops_b = gl.reduce((of_lines(a, cluster, c), of_lines(b, cluster, c)), 0, both_larger)
        put(Q, S, row, M, k, a, top_a, tops_a, factor_a, cluster, c, REACH, padded, QMAX, CLUSTERS, COUNT, EVEN)
        put(Q, S, row + 1, M, k, b, top_b, tops_b, factor_b, cluster, c, REACH, padded, QMAX, CLUSTERS, COUNT, EVEN)


def takes(
    x: Tensor,
    *,
    symmetric: bool = True,
    source: str = "",
    bias: Tensor | None = None,
    permutation: Tensor | None = None,
    rotation: int = 0,
    shift: Tensor | None = None,
    side_index: Tensor | None = None,
    side_mask: Tensor | None = None,
    in_scale: Tensor | None = None,
    clusters: Tensor | None = None,
    reach: Tensor | None = None,
    align: int = 16,
    threshold: float = 0.0,
    **_: object,
) -> bool:
    """Whether this kernel does what is asked of ``quantize``."""
    others = (bias, shift, side_index, side_mask, in_scale)
    if permutation is None or not symmetric or rotation or threshold or any(v is not None for v in others):
        return False
    if clusters is not None and reach is not None and (align % LINE or len(reach) > MOST_CLUSTERS):
        return False
    places = x.shape[1] if clusters is None else 16 * len(clusters)
    fits = x.shape[1] >= LEAST and places <= LARGEST
    return source in ("", "rms") and fits and x.element_size() == 2 and x.stride(1) == 1 and x.shape[0] > 0


def quantize(
    x: Tensor,
    *,
    permutation: Tensor,
    bits: int = 8,
    source: str = "",
    x2: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    pre_scale: Tensor | None = None,
    clusters: Tensor | None = None,
    reach: Tensor | None = None,
    **_: object,
) -> list[Tensor]:
    """As :func:`quantkit.ops.gpu.quantize.quantize`, for what :func:`takes`."""
    m, k = x.shape
    x2 = x2 if x2 is None or x2.stride(1) == 1 else x2.contiguous()
    places, count = (padded(k), 1) if clusters is None or reach is None else (16 * len(clusters), len(reach))
    q, scale = x.new_empty((m, places), dtype=torch.int8), x.new_empty((m, count), dtype=torch.float32)
    kept = x.new_empty((m, k)) if x2 is not None else None
    block = triton.next_power_of_2(places)
    warps, pdl = block // 512, hopper(x.device)
    order_kernel[(min(triton.cdiv(m, 2), PROCESSORS * 16 // warps),)](
        x, x2, gain, pre_scale, permutation, clusters, reach, q, scale, kept, m, k, places,
        x.stride(0), 0 if x2 is None else x2.stride(0), eps, offset,
        source, qmax(bits), triton.next_power_of_2(count), count, block, block == k == places, pdl,
        num_warps=warps, enable_fp_fusion=False, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return [q, scale] if kept is None else [q, scale, kept]
