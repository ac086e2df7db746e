"""The common forms of :mod:`.quantize` at the speed of memory, in Gluon: one program holds a row in registers.

A row of K channels lies as ``[G, L]``, L of them (64, or a longer block of the rotation) beside each other. Four threads share
the L channels of a line, and eight lines are side by side in a warp. That is how operands of ``mma`` lie, so that a Hadamard
product needs no exchange of data: the bits of a channel's number that select a thread, and two more, are transformed by one
``mma`` with a 16 x 16 matrix of +-1, the others by sums and differences in registers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit.core.numerics import qmax
from quantkit.ops.gpu.configs import PROCESSORS, padded
from quantkit.ops.gpu.quantize import FINE, FLOOR, ROUND, gated, hopper, with_unit

LINE = 64
LEAST_ROTATION, LARGEST_ROTATION = 8, 256
LEAST, LARGEST = 512, 2**15
"""Channels of a row: fewer leave most lines empty, more do not fit the registers."""

MOST_CLUSTERS = 32
"""Threads of a warp, which look for the ranges of clusters side by side."""

RING = 2
"""Rows ahead in shared memory."""

MMA_BITS = (0, 3, 4, 5)
"""Bits of a channel's number that the ``mma`` transforms: 0 and 5 select a register, 3 and 4 a thread."""


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
def larger(a, b):
    """The larger absolute value, NaN if there is one."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b; }", "=r,r,r", [a, b], dtype=gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def sum_and_larger(s, a, t, b):
    return s + t, larger(a, b)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def low_bytes(x, mask):
    """The low bytes of four registers in one; ``mask`` 0 makes them 0."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x40; prmt.b32 b, $3, $4, 0x40; prmt.b32 a, a, b, 0x5410; and.b32 $0, a, $5; }",
        "=r,r,r,r,r,r,r,r,r", [x, mask], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def read(P, row, M, stride, k, K, EVEN: gl.constexpr):
    """A row, or zeros past the last one."""
    at, real = P + row.to(gl.int64) * stride + k, (row < M) & (k >= 0)
    return gl.load(at, mask=real if EVEN else real & (k < K), other=0.0)


@gluon.jit
def fetch(slot, P, row, M, stride, k, K, EVEN: gl.constexpr):
    """Start to copy a row (nothing, past the last one) to shared memory: every thread what it will read itself."""
    at, real = P + row.to(gl.int64) * stride + k, (row < M) & (k >= 0)
    async_copy.async_copy_global_to_shared(slot, at, mask=real if EVEN else real & (k < K))


@gluon.constexpr_function
def by_cluster(layout: gl.DistributedLinearLayout, clusters: int) -> gl.DistributedLinearLayout:
    """``[g, clusters]`` for lines that are spread as ``layout`` does: the threads along a line have a cluster each."""
    bits = [[0, 1 << i] for i in range(clusters.bit_length() - 1)]
    lanes = [(bits.pop(0) if bits else [0, 0]) if base[1] else base for base in layout.lane_bases]
    registers = bits + [base for base in layout.reg_bases if not base[1]]
    return gl.DistributedLinearLayout(registers, lanes, layout.warp_bases, [], [layout.shape[0], clusters])


@gluon.jit
def of_lines(x, cluster, c):
    """For lines ``x [G, L]`` of clusters ``[G]``: ``[G, CLUSTERS]``, the largest absolute value where it counts, else 0."""
    along: gl.constexpr = cluster.type.layout
    return gl.where(cluster[:, None] == c, gl.convert_layout(gl.abs(gl.reduce(x, 1, larger)), along)[:, None], 0.0)


@gluon.jit
def shared(scale, shares, AXIS: gl.constexpr):
    """numerics.shared of scales of clusters along AXIS: units and multiples."""
    terms = scale * shares
    top = gl.expand_dims(gl.reduce(terms, AXIS, larger), AXIS)
    parts = gl.ceil(gl.div_rn(terms, gl.zeros_like(terms) + top) * FINE)  # whole numbers, at most 2**22 together
    unit = gl.expand_dims(gl.reduce(parts, AXIS, add), AXIS) * (1 / FINE) * top
    return unit, gl.maximum(2.0 * gl.ceil((gl.div_rn(scale, gl.zeros_like(scale) + unit) - 1.0) * 0.5) + 1.0, 1.0)


@gluon.jit
def rows_kernel(X, X2, GAIN, BIAS, PRE, PERM, MATRIX, CLUSTER, SHARES, Q, S, SUM, M, K, padded, stride_x, stride_2, eps, offset,
                SOURCE: gl.constexpr, QMAX: gl.constexpr, ROTATION: gl.constexpr, CLUSTERS: gl.constexpr, COUNT: gl.constexpr,
                L: gl.constexpr, B: gl.constexpr, EVEN: gl.constexpr, AHEAD: gl.constexpr, RING: gl.constexpr,
                ROUNDED: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Rows of K channels, one at a time; see :func:`quantkit.ops.gpu.quantize.quantize` for the arguments.

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
        perm = gl.load(PERM + k, mask=k < (padded if CLUSTERS > 1 else K), other=-1).to(gl.int32)
        perm = gl.where(perm < 0, K, perm)  # where there is padding, channel K is 0
        if FIRST:
            source = perm
    if CLUSTERS > 1:
        small: gl.constexpr = by_cluster(layout, CLUSTERS)
        c, line = gl.arange(0, CLUSTERS, gl.SliceLayout(0, small))[None, :], gl.arange(0, G, gl.SliceLayout(1, small))
        cluster = gl.load(CLUSTER + line * (L // 16), mask=line * L < padded, other=-1)
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
            if CLUSTERS > 1:
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
        if SOURCE == "rms" and CLUSTERS == 1:  # the root commutes with all that follows it, so that one reduction serves both
            total, top = gl.reduce((squares, x.reshape([B])), 0, sum_and_larger)
            factor = factor * (1.0 / gl.sqrt_rn(total / K + eps))
        elif CLUSTERS == 1:
            top = gl.reduce(x.reshape([B]), 0, larger)
        else:
            tops = gl.reduce(of_lines(x, cluster, c), 0, larger)
            top = gl.reduce(tops, 0, larger)
        finite = (gl.abs(top) < float("inf")) & (gl.abs(top) * factor < float("inf"))
        if CLUSTERS > 1:
            absmax = gl.maximum(gl.where(finite, gl.abs(tops) * factor, 0.0), FLOOR)[None, :]
            scale = gl.div_rn(absmax, gl.full_like(absmax, 1.0 * QMAX))
            unit, multiple = shared(scale, shares, 1)
            of_each = gl.div_rn(gl.full_like(scale, 1.0), unit * multiple)
            inverse = gl.reduce(gl.where(cluster[:, None] == c, of_each, 0.0), 1, add)
            inverse = gl.convert_layout(inverse, gl.SliceLayout(1, layout))[:, None] * factor
            gl.store(S + row * (1 + COUNT) + 0 * c, gl.where(finite, unit, float("nan")))
            gl.store(S + row * (1 + COUNT) + 1 + c, gl.where(finite, multiple, 1.0), mask=c < COUNT)
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


def takes(
    x: Tensor,
    *,
    symmetric: bool = True,
    source: str = "",
    x2: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    pre_scale: Tensor | None = None,
    permutation: Tensor | None = None,
    rotation: int = 0,
    shift: Tensor | None = None,
    side_index: Tensor | None = None,
    side_mask: Tensor | None = None,
    in_scale: Tensor | None = None,
    clusters: Tensor | None = None,
    shares: Tensor | None = None,
    align: int = 16,
    threshold: float = 0.0,
    **_: object,
) -> bool:
    """Whether this kernel does what is asked of ``quantize``, and faster: codes alone are not."""
    others = (shift, side_index, side_mask, in_scale)
    common = symmetric and not threshold and all(v is None for v in others)
    alone = x2 is None and gain is None and pre_scale is None and permutation is None
    largest = LARGEST if alone and clusters is None else LARGEST // 2
    common = common and bool(source or rotation or not alone) and not (source == "rms" and bias is not None)
    if clusters is not None and shares is not None:
        common = common and align % max(LINE, rotation) == 0 and len(shares) <= MOST_CLUSTERS
    places = x.shape[1] if clusters is None else 16 * len(clusters)
    fits = x.shape[1] >= LEAST and places <= largest and (not rotation or LEAST_ROTATION <= rotation <= LARGEST_ROTATION)
    if not (common and fits and x.stride(1) == 1 and x.shape[0] > 0):
        return False
    if x2 is None:
        return True
    shape, order = shape_for(x, source, x2, gain, pre_scale, permutation, rotation, places), permutation is not None
    return not shape.crowded or shape.bytes(x.element_size(), order) <= shared_memory(x.device)


def quantize(
    x: Tensor,
    *,
    bits: int = 8,
    source: str = "",
    x2: Tensor | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    pre_scale: Tensor | None = None,
    permutation: Tensor | None = None,
    rotation: int = 0,
    clusters: Tensor | None = None,
    shares: Tensor | None = None,
    **_: object,
) -> list[Tensor]:
    """As :func:`quantkit.ops.gpu.quantize.quantize`, for what :func:`takes`."""
    m, k = x.shape
    x2 = x2 if x2 is None or x2.stride(1) == 1 else x2.contiguous()
    places, count = (padded(k), 1) if clusters is None or shares is None else (16 * len(clusters), len(shares))
    q, scale = x.new_empty((m, places), dtype=torch.int8), x.new_empty((m, with_unit(count)), dtype=torch.float32)
    kept = x.new_empty((m, k)) if x2 is not None and source in ("rms", "layer") else None
    gate, order = x2 is not None and kept is None, permutation is not None
    shape = shape_for(x, source, x2, gain, pre_scale, permutation, rotation, k if clusters is None else places)
    ring = shape.ring and _copied(x, x2) and shape.bytes(x.element_size(), order) <= shared_memory(x.device)
    ahead = shape.ahead and not ring
    exact = (gate or not source) and pre_scale is None and x.dtype != torch.float32
    pdl = hopper(x.device)
    rows_kernel[(min(m, shape.programs) if ring or ahead else m,)](
        x, x2, gain, bias, pre_scale, permutation,
        hadamard_16(rotation, x.device, x.dtype if exact else torch.bfloat16) if rotation else None, clusters, shares,
        q, scale, kept, m, k, places, x.stride(0), 0 if x2 is None else x2.stride(0), eps, offset,
        source, qmax(bits), rotation, triton.next_power_of_2(count), count, shape.line, shape.block, shape.block == k, ahead,
        RING if ring else 0, gate and exact, pdl,
        num_warps=shape.warps, enable_fp_fusion=False, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return [q, scale] if kept is None else [q, scale, kept]


@dataclass(frozen=True)
class Shape:
    """How rows are held: ``line`` channels side by side, ``block`` with the padding, by ``warps``.

    With ``ahead`` or ``ring``, ``programs`` take many rows each and fetch the next while they work on one, into registers or
    shared memory. That pays where rows share vectors, and where they are so long that too few programs fit on the GPU at once
    to hide each other's waiting.
    """

    line: int
    block: int
    warps: int
    programs: int
    ahead: bool
    ring: bool
    two: bool
    crowded: bool
    """Whether there are registers only for what is not ahead."""

    def bytes(self, size: int, order: bool) -> int:
        """Shared memory with rings, of elements of ``size`` bytes: rows ahead, gain, a row to be put in order, reductions."""
        return self.block * size * (RING * (1 + self.two) + 2 * order) + 4096


def shape_for(
    x: Tensor,
    source: str,
    x2: Tensor | None,
    gain: Tensor | None,
    pre_scale: Tensor | None,
    permutation: Tensor | None,
    rotation: int,
    places: int,
) -> Shape:
    """The shape for these arguments of :func:`quantize`."""
    vectors = any(v is not None for v in (gain, pre_scale, permutation))
    gate = x2 is not None and source not in ("rms", "layer")
    return shape_of(places, rotation, len(x), two=x2 is not None, gate=gate, order=permutation is not None, vectors=vectors)


def shape_of(k: int, rotation: int, m: int, *, two: bool, gate: bool, order: bool, vectors: bool) -> Shape:
    """The shape for ``m`` rows of ``k`` places; ``two`` inputs, an ``order`` and ``vectors`` want registers too."""
    line = max(LINE, rotation)
    block = max(triton.next_power_of_2(k), 16 * line)
    warps = min(block // 1024, block // (16 * line), 16)
    # 16 warps fill the registers of a processor. Two short rows are fetched too slowly by so few.
    programs = PROCESSORS * (8 if two and warps < 16 else 16 // warps)
    many, room = m > programs, block <= 1024 * warps
    crowded = gate and vectors and warps == 16
    ring = crowded or (many and room and (order or (gate and warps == 16)))
    ahead = many and room and not (two and warps == 16) and (vectors or block > 8192)
    return Shape(line, block, warps, programs, ahead, ring, two, crowded)


def _copied(*rows: Tensor | None) -> bool:
    """Whether rows may be copied to shared memory, 16 bytes at a time."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 for t in rows if t is not None)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


@functools.cache
def hadamard_16(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[16, 16]``, the part of a Hadamard matrix that :data:`MMA_BITS` make up: bits beyond ``block`` stay as they are."""
    matrix = torch.ones(1, 1)
    for bit in reversed(MMA_BITS):
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) if 1 << bit < block else torch.eye(2)
        matrix = torch.kron(matrix, one)
    return matrix.to(device, dtype)
