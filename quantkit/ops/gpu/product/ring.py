"""Device code, in Gluon, that both products for Hopper share: the ring of slots in shared memory, and the order of tiles.

:mod:`.many` and :mod:`.few` stream tiles through shared memory with the tensor memory accelerator (TMA): one producer warp
loads into a ring of slots, one or two groups of four warps multiply (wgmma) and rescale. TMA fills with zeros beyond M, N and
K and clips stores, so there is no code for tails. It needs 16-byte rows: K a multiple of 16, and N of 8 for a 16-bit result.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from quantkit.ops.gpu import layout

renamed = hasattr(tma, "async_load")  # in Triton 3.9
load = tma.async_load if renamed else tma.async_copy_global_to_shared
store = tma.async_store if renamed else tma.async_copy_shared_to_global
ROWS = gl.constexpr(64)  # rows of a wgmma
SIDE = gl.constexpr(layout.SIDE)
PIECE = gl.constexpr(layout.BLOCK)  # of K, in a box of TMA; groups start at multiples of it


@gluon.jit
def first_row(tile, M, HEIGHT: gl.constexpr):
    """Where a tile of tokens starts. The last one moves up to end at M: TMA is slow at filling with zeros, and a token that
    is computed twice gets the same bits twice."""
    return gl.minimum(tile * HEIGHT, gl.maximum(M - HEIGHT, 0))


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The next slot of the ring, and the parity to wait for there."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def side_of(buffer, desc):
    """A slot of the ring as a tile of 16-bit columns."""
    return buffer._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def active_tiles(ACTIVE, SIDES: gl.constexpr):
    """Tiles of side columns that hold the active ones of this batch."""
    return gl.minimum(gl.cdiv(gl.load(ACTIVE), SIDE), SIDES)


@gluon.jit
def inverse(odd):
    """Modulo 2**32: an odd number is its own in 3 bits, and each round makes twice as many right."""
    x = odd
    for _ in gl.static_range(4):
        x = x * (2 - odd * x)
    return x


@gluon.jit
def token_multiplier(SX, m, g, M, GROUPS: gl.constexpr):
    """How often group ``g``, or the last one, counts for tokens ``m``."""
    g = gl.minimum(g, GROUPS - 1)
    return gl.load(SX + m * (1 + GROUPS) + 1 + g, mask=m < M, other=1.0).to(gl.int32)


@gluon.jit
def row_multiplier(SW, n, g, N, GROUPS: gl.constexpr):
    """How often group ``g``, or the last one, counts for rows ``n`` of the weight."""
    return gl.load(SW + (1 + gl.minimum(g, GROUPS - 1)) * N + n, mask=n < N, other=1.0).to(gl.int32)
