"""Device code, in Gluon, that :mod:`.rows` and :mod:`.order` share: rows as lines of channels, their ranges and their codes.

Both hold a row of K channels as ``[G, L]``: G lines of L channels beside each other, so that each line belongs to one group of
channels. They differ in how lines are spread over threads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantkit.ops.gpu.numbers import FINE


@gluon.jit
def larger(a, b):
    """The larger absolute value, NaN if there is one."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b; }", "=r,r,r", [a, b], dtype=gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip


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


@gluon.constexpr_function
def by_group(layout: gl.DistributedLinearLayout, groups: int) -> gl.DistributedLinearLayout:
    """``[g, groups]`` for lines that are spread as ``layout`` does: the threads along a line have a group each."""
    bits = [[0, 1 << i] for i in range(groups.bit_length() - 1)]
    lanes = [(bits.pop(0) if bits else [0, 0]) if base[1] else base for base in layout.lane_bases]
    registers = bits + [base for base in layout.reg_bases if not base[1]]
    return gl.DistributedLinearLayout(registers, lanes, layout.warp_bases, [], [layout.shape[0], groups])


@gluon.jit
def of_lines(x, group, c):
    """For lines ``x [G, L]`` of groups ``[G]``: ``[G, GROUPS]``, the largest absolute value where it counts, else 0."""
    along: gl.constexpr = group.type.layout
    return gl.where(group[:, None] == c, gl.convert_layout(gl.abs(gl.reduce(x, 1, larger)), along)[:, None], 0.0)


@gluon.jit
def shared(scale, shares, AXIS: gl.constexpr):
    """Base scales and multipliers along AXIS of what needs ``scale``; see :func:`quantkit.core.groups.with_multipliers`."""
    terms = scale * shares
    top = gl.expand_dims(gl.reduce(terms, AXIS, larger), AXIS)
    parts = gl.ceil(gl.div_rn(terms, gl.zeros_like(terms) + top) * FINE)  # whole numbers, at most 2**22 together
    base = gl.expand_dims(gl.reduce(parts, AXIS, add), AXIS) * (1 / FINE) * top
    return base, gl.maximum(2.0 * gl.ceil((gl.div_rn(scale, gl.zeros_like(scale) + base) - 1.0) * 0.5) + 1.0, 1.0)
