"""Device code, in Gluon, for the common forms of codes at the speed of memory: one program holds a row in registers.

A row of K channels lies as ``[G, L]``: G lines of L channels beside each other, 64 or as many as a block of the rotation. Four
threads share the channels of a line, and eight lines are side by side in a warp. That is how operands of ``mma`` lie, so that
a Hadamard product needs no exchange of data: the bits of a channel's number that select a thread, and two more, are
transformed by one ``mma`` with a 16 x 16 matrix of +-1, the others by sums and differences in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.ops.gpu.codes.gates import gated
from quantkit.ops.gpu.codes.lines import add, by_group, larger, low_bytes, of_lines, read, shared
from quantkit.ops.gpu.codes.shapes import LINE
from quantkit.ops.gpu.numbers import FLOOR, ROUND


@gluon.constexpr_function
def lines(g: int, length: int, warps: int) -> gl.DistributedLinearLayout:
    """How ``[g, length]`` is spread: 8 channels beside each other a thread, 4 threads along a line, 8 lines a warp."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[0, 32 << i] for i in range((length // LINE).bit_length())] + [[8, 0]]
    threads = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    spread = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    rest = [[16 * warps << i, 0] for i in range((g // (16 * warps)).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers + rest, threads, spread, [], [g, length])


@gluon.jit
def butterfly(x, STRIDE: gl.constexpr, B: gl.constexpr):
    """Sums and differences of the elements ``STRIDE`` apart of ``x [B]``."""
    a, b = x.reshape([B // (2 * STRIDE), 2, STRIDE]).permute([0, 2, 1]).split()
    return gl.join(a + b, a - b).permute([0, 2, 1]).reshape([B])


@gluon.jit
def truncated(x):
    """bf16 of the upper halves of ``x`` float32."""
    return gl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def rounded(x):
    """bf16 of ``x`` float32, to nearest; two in an instruction, where Triton's own cast takes one at a quarter of the rate."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def rotate(x, matrix, BLOCK: gl.constexpr, G: gl.constexpr, L: gl.constexpr):
    """Blocks of ``x [G, L]`` times a Hadamard matrix of +-1, in float32. 16-bit x is exact; of float32, 16 bits count."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    B: gl.constexpr = G * L
    layout: gl.constexpr = x.type.layout
    a = x.reshape([G, L // 64, 2, 4, 4, 2]).permute([1, 4, 0, 2, 3, 5]).reshape([B // 16, 16])
    a = gl.convert_layout(a, operand)
    y = gl.zeros([B // 16, 16], gl.float32, mma)
    if a.dtype == gl.float32:
        upper = (a.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
        y = mma_v2(rounded(a - upper), matrix, y)
        a = truncated(a)
    y = mma_v2(a, matrix, y)
    y = y.reshape([L // 64, 4, G, 2, 4, 2]).permute([2, 0, 3, 4, 1, 5]).reshape([B])
    y = butterfly(butterfly(y, 2, B), 4, B)
    if BLOCK > 64:
        y = butterfly(y, 64, B)
    if BLOCK > 128:
        y = butterfly(y, 128, B)
    return gl.convert_layout(y.reshape([G, L]), layout)


@gluon.jit
def silu(x):
    """``x * sigmoid(x)`` with the GPU's own exponential and reciprocal, each wrong by a bit or two of 24."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 a; mul.f32 a, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 a, a; add.f32 a, a, 0f3F800000; rcp.approx.ftz.f32 a, a; "
        "mul.f32 $0, $1, a; }", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def sum_and_larger(s, a, t, b):
    return s + t, larger(a, b)


@gluon.jit
def fetch(slot, P, row, M, stride, k, K, EVEN: gl.constexpr):
    """Start to copy a row (nothing, past the last one) to shared memory: every thread what it will read itself."""
    at, real = P + row.to(gl.int64) * stride + k, (row < M) & (k >= 0)
    async_copy.async_copy_global_to_shared(slot, at, mask=real if EVEN else real & (k < K))


@gluon.jit
def rows_kernel(X, X2, GAIN, BIAS, PRE, PERM, MATRIX, GROUP, SHARES, Q, S, SUM, M, K, padded, stride_x, stride_2, eps, offset,
                SOURCE: gl.constexpr, QMAX: gl.constexpr, ROTATION: gl.constexpr, GROUPS: gl.constexpr, COUNT: gl.constexpr,
                L: gl.constexpr, B: gl.constexpr, EVEN: gl.constexpr, AHEAD: gl.constexpr, RING: gl.constexpr,
                ROUNDED: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Rows of K channels, one at a time; see :class:`.request.CodesRequest` for the arguments.

    AHEAD fetches the next row of this program while this one is worked on, and keeps the vectors for all of them. RING > 0
    fetches so many rows into shared memory, for want of registers. With ROUNDED a gate is rounded to the dtype of x before a
    rotation, as it would be in memory: the rotation is then one product, of numbers that it holds exactly.
    """
    G: gl.constexpr = B // L
    layout: gl.constexpr = lines(G, L, gl.num_warps())
    g, j = gl.arange(0, G, gl.SliceLayout(1, layout)), gl.arange(0, L, gl.SliceLayout(0, layout))
    k = g[:, None] * L + j[None, :]
    # The vectors do not depend on the kernel before: they are on the way while that one ends.
    # Channels are put in order as they come, in 16 bit, and the vectors with them; behind a gate, in float32.
    FIRST: gl.constexpr = PERM is not None and (SOURCE == "" or SOURCE == "rms" or SOURCE == "layer")
    source = k
    if PERM is not None:
        perm = gl.load(PERM + k, mask=k < (padded if GROUPS > 1 else K), other=-1).to(gl.int32)
        perm = gl.where(perm < 0, K, perm)  # where there is padding, channel K is 0
        if FIRST:
            source = perm
    if GROUPS > 1:
        small: gl.constexpr = by_group(layout, GROUPS)
        c, line = gl.arange(0, GROUPS, gl.SliceLayout(0, small))[None, :], gl.arange(0, G, gl.SliceLayout(1, small))
        group = gl.load(GROUP + line * (L // 16), mask=line * L < padded, other=-1)
        shares = gl.load(SHARES + c, mask=c < COUNT, other=0.0)
    if PRE is not None:
        pre = gl.load(PRE + source, mask=source < K, other=0.0)
    if GAIN is not None:
        gain = gl.load(GAIN + source, mask=source < K, other=0.0)
    if BIAS is not None:
        bias = gl.load(BIAS + source, mask=source < K, other=0.0)
    if ROTATION > 0:
        mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [gl.num_warps(), 1], [16, 8])
        right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
        a, b = gl.arange(0, 16, gl.SliceLayout(1, right)), gl.arange(0, 16, gl.SliceLayout(0, right))
        matrix = gl.load(MATRIX + a[:, None] * 16 + b[None, :])
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first, step, slot = gl.program_id(0), gl.num_programs(0), 0
    if RING > 0:
        straight: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
        if GAIN is not None:  # registers are scarce
            kept_gain = gl.allocate_shared_memory(gain.dtype, [G, L], straight, gain)
        x_ring = gl.allocate_shared_memory(X.dtype.element_ty, [RING, G, L], straight)
        if X2 is not None:
            x2_ring = gl.allocate_shared_memory(X2.dtype.element_ty, [RING, G, L], straight)
        for i in gl.static_range(RING):
            fetch(x_ring.index(i), X, first + i * step, M, stride_x, k, K, EVEN)
            if X2 is not None:
                fetch(x2_ring.index(i), X2, first + i * step, M, stride_2, k, K, EVEN)
            async_copy.commit_group()
    else:
        x_ahead = read(X, first, M, stride_x, k, K, EVEN)
        if X2 is not None:
            x2_ahead = read(X2, first, M, stride_2, k, K, EVEN)
    for row in range(first, M, step):
        if RING > 0:
            async_copy.wait_group(RING - 1)
            x = x_ring.index(slot).load(layout)
            fetch(x_ring.index(slot), X, row + RING * step, M, stride_x, k, K, EVEN)
            if X2 is not None:
                x2 = x2_ring.index(slot).load(layout).to(gl.float32)
                fetch(x2_ring.index(slot), X2, row + RING * step, M, stride_2, k, K, EVEN)
            async_copy.commit_group()
            slot = (slot + 1) % RING
        else:
            x = x_ahead
            if X2 is not None:
                x2 = x2_ahead.to(gl.float32)
        if AHEAD:
            x_ahead = read(X, row + step, M, stride_x, k, K, EVEN)
            if X2 is not None:
                x2_ahead = read(X2, row + step, M, stride_2, k, K, EVEN)
        if X2 is not None and (SOURCE == "rms" or SOURCE == "layer"):
            x = (x.to(gl.float32) + x2).to(SUM.dtype.element_ty)
            gl.store(SUM + gl.cast(row, gl.int64) * K + k, x, mask=k < K)
        if FIRST:
            x = gl.gather(x.reshape([B]), perm.reshape([B]), 0).reshape([G, L])
        if SOURCE != "" or PRE is not None or ROTATION == 0:
            x = x.to(gl.float32)
        if SOURCE == "silu":
            x = silu(x) * x2
        elif SOURCE == "gelu" or SOURCE == "gelu_tanh":
            x = gated(x, x2, SOURCE)
        factor = 1.0 / ROTATION**0.5 if ROTATION > 0 else 1.0
        if SOURCE == "layer":
            x = gl.where(source < K, x - gl.reduce(x.reshape([B]), 0, add) / K, 0.0)
            x = x * (1.0 / gl.sqrt_rn(gl.reduce((x * x).reshape([B]), 0, add) / K + eps))
        if SOURCE == "rms":
            squares = (x * x).reshape([B])
            if GROUPS > 1:
                factor = factor * (1.0 / gl.sqrt_rn(gl.reduce(squares, 0, add) / K + eps))
        if GAIN is not None:
            if RING > 0:
                gain = kept_gain.load(layout)
            x = x * (gain.to(gl.float32) + offset)
        if BIAS is not None:
            x = x + bias.to(gl.float32)
        if PRE is not None:
            x = x * pre
        if PERM is not None and not FIRST:
            x = gl.gather(x.reshape([B]), perm.reshape([B]), 0).reshape([G, L])
        if ROTATION > 0:
            if ROUNDED:
                x = x.to(X.dtype.element_ty)
            x = rotate(x, matrix, ROTATION, G, L)
        if SOURCE == "rms" and GROUPS == 1:  # the root commutes with all that follows it, so that one reduction serves both
            total, top = gl.reduce((squares, x.reshape([B])), 0, sum_and_larger)
            factor = factor * (1.0 / gl.sqrt_rn(total / K + eps))
        elif GROUPS == 1:
            top = gl.reduce(x.reshape([B]), 0, larger)
        else:
            tops = gl.reduce(of_lines(x, group, c), 0, larger)
            top = gl.reduce(tops, 0, larger)
        finite = (gl.abs(top) < float("inf")) & (gl.abs(top) * factor < float("inf"))
        if GROUPS > 1:
            absmax = gl.maximum(gl.where(finite, gl.abs(tops) * factor, 0.0), FLOOR)[None, :]
            scale = gl.div_rn(absmax, gl.full_like(absmax, 1.0 * QMAX))
            base, multiplier = shared(scale, shares, 1)
            of_each = gl.div_rn(gl.full_like(scale, 1.0), base * multiplier)
            inverse = gl.reduce(gl.where(group[:, None] == c, of_each, 0.0), 1, add)
            inverse = gl.convert_layout(inverse, gl.SliceLayout(1, layout))[:, None] * factor
            gl.store(S + row * (1 + COUNT) + 0 * c, gl.where(finite, base, float("nan")))
            gl.store(S + row * (1 + COUNT) + 1 + c, gl.where(finite, multiplier, 1.0), mask=c < COUNT)
        else:
            absmax, limit = gl.maximum(gl.abs(top) * factor, FLOOR), gl.to_tensor(1.0 * QMAX)
            inverse = gl.div_rn(limit, absmax) * factor
            gl.store(S + row, gl.where(finite, gl.div_rn(absmax, limit), float("nan")))
        v = x * inverse + ROUND
        q = low_bytes(v, gl.full_like(v.to(gl.int32, bitcast=True), gl.where(finite, -1, 0)))
        out = Q + gl.cast(row, gl.int64) * padded + k
        if EVEN:
            gl.store(out, q)
        else:
            gl.store(out, q, mask=k < padded)
