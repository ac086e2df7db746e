"""Device code, in Gluon, that puts channels in order on their way to codes, after a norm or not, at the speed of memory.

An order is a gather, and shared memory serves a gather only a few elements at a time, because many of them lie in the same
bank. So a program takes two rows of 16 bit at once: a word of shared memory holds one channel of both, and one gather moves
them together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.ops.gpu.codes.lines import add, by_group, larger, low_bytes, of_lines, read, shared
from quantkit.ops.gpu.codes.shapes import LINE
from quantkit.ops.gpu.numbers import FLOOR, ROUND

WIDTH = gl.constexpr(LINE)


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


@gluon.constexpr_function
def by_warp(warps: int, groups: int) -> gl.DistributedLinearLayout:
    """How ``[warps, groups]`` copies of results lie, one in each warp, as :func:`aside` leaves them there."""
    bits = [[0, 0]] + [[0, 1 << i] for i in range(groups.bit_length() - 1)]
    lanes, own = (bits + [[0, 0]] * 5)[:5], [[1 << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(bits[5:], lanes, own, [], [warps, groups])


@gluon.constexpr_function
def aside(warps: int, groups: int) -> gl.DistributedLinearLayout:
    """How ``[warps, groups, 2]`` results lie, the same in every warp: beside each other, as far as its threads go."""
    bits = [[0, 0, 1]] + [[0, 1 << i, 0] for i in range(groups.bit_length() - 1)]
    bits += [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]
    lanes = (bits + [[0, 0, 0]] * 5)[:5]
    return gl.DistributedLinearLayout(bits[5:], lanes, [[0, 0, 0]] * (warps.bit_length() - 1), [], [warps, groups, 2])


@gluon.jit
def both_larger(a, b, c, d):
    return larger(a, c), larger(b, d)


@gluon.jit
def both_sums(a, b, c, d):
    return a + c, b + d


@gluon.jit
def words(a, b):
    """The bits of ``a`` in the low half of each word, those of ``b`` in the high one."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;", "=r,=r,r,r", [a, b], dtype=gl.uint32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def pair(P, row, M, stride, k, K, EVEN: gl.constexpr):
    """Two rows."""
    return read(P, row, M, stride, k, K, EVEN), read(P + stride, row, M - 1, stride, k, K, EVEN)


@gluon.jit
def halves(word, dtype: gl.constexpr):
    """What :func:`words` put together, in float32."""
    if dtype == gl.bfloat16:
        a, b = (word << 16).to(gl.float32, bitcast=True), (word & 0xFFFF0000).to(gl.float32, bitcast=True)
    else:
        a = word.to(gl.uint16).to(dtype, bitcast=True).to(gl.float32)
        b = (word >> 16).to(gl.uint16).to(dtype, bitcast=True).to(gl.float32)
    return a, b


@gluon.jit
def in_order(x, perm, B: gl.constexpr):
    return gl.gather(x.reshape([B]), perm.reshape([B]), 0).reshape(x.shape)


@gluon.jit
def of_threads(x, B: gl.constexpr):
    """``x [G, 64]`` as ``[elements, threads, warps]`` of whoever holds them."""
    W: gl.constexpr = gl.num_warps()
    return x.reshape([B // (256 * W), W, 32, 8]).permute([0, 3, 2, 1]).reshape([B // (32 * W), 32, W])


@gluon.jit
def squares(x, B: gl.constexpr):
    """Sums of four squares ``[elements / 4, threads, warps]``, all but the first added as they are multiplied."""
    x = of_threads(x, B)
    a, b = x.reshape([x.shape[0] // 4, 2, 2, 32, x.shape[2]]).permute([0, 3, 4, 1, 2]).split()
    a, c = a.split()
    b, d = b.split()
    return gl.fma(d, d, gl.fma(c, c, gl.fma(b, b, a * a)))


@gluon.jit
def for_lines(values, where, layout: gl.constexpr):
    """``values [GROUPS]`` for lines ``[G, 1]``, found by each warp in its own threads, at ``where [warps, G / warps]``."""
    W: gl.constexpr = where.shape[0]
    N: gl.constexpr = where.shape[1]
    copies: gl.constexpr = by_warp(W, values.shape[0])
    values = gl.convert_layout(values, gl.SliceLayout(0, copies))[None, :]
    values, _ = gl.broadcast(values, gl.zeros([W, values.shape[1]], gl.float32, copies))
    values = gl.gather(values, where, 1).reshape([W, N // 4, 4]).permute([1, 0, 2]).reshape([W * N])
    return gl.convert_layout(values, gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def put(Q, row, M, k, x, inverse, padded, EVEN: gl.constexpr):
    """Codes of a row ``x [G, 64]``: 0 where ``inverse`` is."""
    v = x * inverse + ROUND
    q = low_bytes(v, gl.zeros_like(v.to(gl.int32, bitcast=True)) + gl.where(inverse > 0.0, -1, 0))
    gl.store(Q + row.to(gl.int64) * padded + k, q, mask=(row < M) & (k >= 0) if EVEN else (row < M) & (k < padded))


@gluon.jit
def order_kernel(X, X2, GAIN, PRE, PERM, GROUP, SHARES, Q, S, SUM, M, K, padded, stride_x, stride_2, eps, offset,
                 SOURCE: gl.constexpr, QMAX: gl.constexpr, GROUPS: gl.constexpr, COUNT: gl.constexpr, B: gl.constexpr,
                 EVEN: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Two rows of K channels at a time; see :class:`.request.CodesRequest` for the arguments.

    What concerns whole rows, or groups of them, is worked out once for both: ``[GROUPS, 2]`` in the threads of each warp.
    """
    G: gl.constexpr = B // WIDTH
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = beside(G, W)
    g, j = gl.arange(0, G, gl.SliceLayout(1, layout)), gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    k = g[:, None] * WIDTH + j[None, :]
    # The vectors do not depend on the kernel before: they are on the way, and put in order, while that one ends. Whatever
    # comes behind this kernel may begin with what does not depend on it, too.
    if PDL:
        gdc_launch_dependents()
    perm = gl.load(PERM + k, mask=k < (padded if GROUPS > 1 else K), other=-1).to(gl.int32)
    perm = gl.where(perm < 0, K, perm)  # where there is padding, channel K is 0
    of_all: gl.constexpr = aside(W, GROUPS)
    results: gl.constexpr = gl.SliceLayout(0, of_all)
    both, c = gl.arange(0, 2, gl.SliceLayout(0, results)), gl.arange(0, GROUPS, gl.SliceLayout(1, results))
    if GROUPS > 1:
        small: gl.constexpr = by_group(layout, GROUPS)
        n, line = gl.arange(0, GROUPS, gl.SliceLayout(0, small))[None, :], gl.arange(0, G, gl.SliceLayout(1, small))
        group = gl.load(GROUP + line * (WIDTH // 16), mask=line * WIDTH < padded, other=-1)
        where = gl.maximum(group, 0).reshape([G // (4 * W), W, 4]).permute([1, 0, 2]).reshape([W, G // W])
        shares = gl.load(SHARES + c, mask=c < COUNT, other=0.0)[:, None]
    if PRE is not None:
        pre = in_order(gl.load(PRE + k, mask=k < K, other=0.0), perm, B)
    if GAIN is not None:
        gain = in_order(gl.load(GAIN + k, mask=k < K, other=0.0), perm, B).to(gl.float32) + offset
    all_sums = gl.allocate_shared_memory(gl.float32, [W, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    all_tops = gl.allocate_shared_memory(gl.float32, [W, GROUPS, 2], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    share = 1.0 / K
    gl.thread_barrier()  # behind these gathers: else there is one in every round of the loop
    if PDL:
        gdc_wait()
    first, step = 2 * gl.program_id(0), 2 * gl.num_programs(0)
    # The next two rows are on their way while these are worked on.
    x, y = pair(X, first, M, stride_x, k, K, EVEN)
    if X2 is None:
        word = words(x, y)
    else:
        x2, y2 = pair(X2, first, M, stride_2, k, K, EVEN)
    for row in range(first, M, step):
        if X2 is not None:
            x = (x.to(gl.float32) + x2.to(gl.float32)).to(SUM.dtype.element_ty)
            y = (y.to(gl.float32) + y2.to(gl.float32)).to(SUM.dtype.element_ty)
            out = SUM + gl.cast(row, gl.int64) * K + k
            gl.store(out, x, mask=k < K)
            gl.store(out + K, y, mask=(k < K) & (row + 1 < M))
            word = words(x, y)
            x2, y2 = pair(X2, row + step, M, stride_2, k, K, EVEN)
        x, y = pair(X, row + step, M, stride_x, k, K, EVEN)
        a, b = halves(in_order(word, perm, B), X.dtype.element_ty)
        if SOURCE == "rms":
            sum_a, sum_b = gl.reduce(gl.reduce((squares(a, B), squares(b, B)), 0, both_sums), 0, both_sums)
            all_sums.store(gl.join(sum_a, sum_b))
        if GAIN is not None:
            a, b = a * gain, b * gain
        if PRE is not None:
            a, b = a * pre, b * pre
        if GROUPS > 1:
            top_a, top_b = of_lines(a, group, n), of_lines(b, group, n)
            top_a = top_a.reshape([G // (4 * W), W, 4, GROUPS]).permute([0, 2, 1, 3]).reshape([G // W, W, GROUPS])
            top_b = top_b.reshape([G // (4 * W), W, 4, GROUPS]).permute([0, 2, 1, 3]).reshape([G // W, W, GROUPS])
            top_a, top_b = gl.reduce((top_a, top_b), 0, both_larger)
        else:  # bits of absolute values are in the order of these, and NaN is the largest: one instruction finds it in a warp
            top_a, top_b = gl.reduce((of_threads(a, B), of_threads(b, B)), 0, both_larger)
            top_a = gl.max(top_a.to(gl.int32, bitcast=True), 0).to(gl.float32, bitcast=True)
            top_b = gl.max(top_b.to(gl.int32, bitcast=True), 0).to(gl.float32, bitcast=True)
        all_tops.store(gl.join(top_a, top_b).reshape([W, GROUPS, 2]))
        tops, factor = gl.reduce(all_tops.load(of_all), 0, larger), gl.full([1, 2], 1.0, gl.float32, results)
        if SOURCE == "rms":  # the root commutes with all that follows it
            sums = gl.reduce(all_sums.load(gl.SliceLayout(1, of_all)), 0, add)
            factor = 1.0 / gl.sqrt_rn(gl.convert_layout(sums, gl.SliceLayout(0, results))[None, :] * share + eps)
        top = gl.reduce(tops, 0, larger)[None, :]
        finite = (gl.abs(top) < float("inf")) & (gl.abs(top) * factor < float("inf"))
        absmax = gl.where(finite, gl.abs(tops) * factor, 0.0)
        absmax = gl.maximum(absmax, FLOOR)
        limit = gl.full_like(absmax, 1.0 * QMAX)
        scale = gl.div_rn(absmax, limit)
        if GROUPS > 1:
            scale, multiplier = shared(scale, shares, 0)
            inverse = gl.div_rn(gl.full_like(absmax, 1.0), scale * multiplier)
        else:
            inverse = gl.div_rn(limit, absmax)
        inverse = gl.where(finite, inverse * factor, 0.0)
        inverse_a = gl.reduce(gl.where(both[None, :] == 0, inverse, 0.0), 1, add)
        inverse_b = gl.reduce(gl.where(both[None, :] == 1, inverse, 0.0), 1, add)
        if GROUPS > 1:
            inverse_a, inverse_b = for_lines(inverse_a, where, layout), for_lines(inverse_b, where, layout)
        else:
            inverse_a, inverse_b = gl.reduce(inverse_a, 0, add), gl.reduce(inverse_b, 0, add)
        put(Q, row, M, k, a, inverse_a, padded, EVEN)
        put(Q + padded, row, M - 1, k, b, inverse_b, padded, EVEN)
        scale = gl.where(finite, scale, float("nan"))
        at = S + (row + both).to(gl.int64)[None, :] * (1 if COUNT == 1 else 1 + COUNT)
        gl.store(at, scale, mask=(row + both < M)[None, :])
        if GROUPS > 1:
            there = (row + both < M)[None, :] & (c < COUNT)[:, None]
            gl.store(at + 1 + c[:, None], gl.where(finite, multiplier, 1.0), mask=there)
        if X2 is None:
            word = words(x, y)
