"""Which kernel multiplies which shape, at which setting: a small table for each architecture.

``quantkit tune`` refines the choice for one device (see :mod:`.tuned`). No choice changes a bit of the results.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.ops.gpu.devices import PROCESSORS


@dataclass(frozen=True)
class Tile:
    """The portable kernel (:mod:`.portable`): tiles of ``m x n``, ``k`` of K at a time, ``group`` row tiles sharing columns."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Gemm:
    """Many tokens on Hopper (:mod:`.many`): tiles of 128 x ``columns``; ``group`` row tiles share columns in L2."""

    columns: int
    stages: int
    group: int = 8
    early: bool = False
    """Whether it may start before the kernel that it depends on has ended."""

    block_k = 128

    @property
    def part(self) -> int:
        """Columns of an accumulator."""
        return min(self.columns, 128)

    @property
    def width(self) -> int:
        """Columns of a staging tile."""
        return self.part // 2


@dataclass(frozen=True)
class Decode:
    """Few tokens on Hopper (:mod:`.few`): 64 weight rows by ``tokens`` tokens, ``block_k`` of K in each of ``stages``."""

    tokens: int
    stages: int
    block_k: int = 256
    early: bool = True

    def registers(self, groups: int = 1) -> int:
        """For each thread; the accumulators alone take half a ``tokens``."""
        return 128 if self.tokens < 128 and groups == 1 else 192

    @property
    def staged(self) -> bool:
        """Whether 16-bit results leave through shared memory, which pays from a hundred tokens."""
        return self.tokens >= 128


@dataclass(frozen=True)
class Vector:
    """One token (:mod:`.vector`): ``groups`` times ``rows`` outputs a program."""

    rows: int
    groups: int
    warps: int


Config = Tile | Gemm | Decode | Vector
"""The kernel and its setting: which class it is says which kernel, and ``quantkit tune`` keeps both in its table."""

PROGRAMS = 120
"""As many tiles keep a Hopper GPU (132 processors) busy; with fewer, smaller tiles win."""

GEMMS = (Gemm(256, 4, group=16, early=True), Gemm(128, 6), Gemm(64, 8))
RINGS = {d.tokens: d for d in (Decode(8, 12), Decode(16, 10), Decode(32, 8), Decode(64, 6), Decode(128, 8, 128))}

TILES = {16: Tile(16, 64, 128, 8, 4, 6), 32: Tile(32, 64, 128, 8, 4, 5), 64: Tile(64, 64, 128, 8, 4, 4)}
LARGE = {
    80: Tile(128, 256, 64, 8, 8, 4),  # A100: 164 KiB of shared memory
    89: Tile(128, 128, 64, 8, 8, 4),  # L4, 4090: 100 KiB
    90: Tile(128, 256, 128, 8, 8, 4),
    100: Tile(128, 256, 128, 8, 8, 3),
}


def portable(arch: int, m: int, n: int, *, in_groups: bool = False) -> Tile:
    """A tile of the kernel that runs everywhere; groups, or active columns, want registers besides the accumulator."""
    for limit, tile in TILES.items():
        if m <= limit:
            return tile
    if m <= 128 or -(-m // 128) * -(-n // 256) < PROGRAMS:
        return Tile(128, 64, 128, 8, 4, 4) if arch != 89 else Tile(128, 64, 64, 8, 4, 4)
    if in_groups:
        return LARGE[89]
    return LARGE[max((a for a in LARGE if a <= arch), default=80)]


def hopper(m: int, n: int, *, in_groups: bool = False) -> Gemm | Decode:
    """The Hopper kernel for ``m`` tokens and ``n`` rows of the weight.

    Many tokens take the tile that gets through in the least time: rounds over the processors times the columns of a tile,
    and what a tile costs besides.
    """
    if m <= (64 if in_groups else 128):  # the widest ring has no registers left
        tokens = next(t for t in RINGS if m <= t)
        if m > 8 and 2 * -(-n // 64) <= PROCESSORS:
            tokens //= 2  # two programs share the tokens, side by side
        return RINGS[tokens]
    return min(GEMMS, key=lambda c: -(-(-(-m // 128) * -(-n // c.columns)) // PROCESSORS) * (c.columns + 32))


def vector(k: int, *, given: bool = False, in_groups: bool = False) -> Vector:
    """The product with one token of ``k`` channels, quantized before (``given``, maybe ``in_groups``) or on the way in."""
    if in_groups:
        return Vector(4, 1, 4) if k <= 8192 else Vector(4, 1, 16)
    if given:
        return Vector(8, 1, 4) if k <= 8192 else Vector(2, 1, 16)
    return Vector(8, 2, 4) if k <= 4096 else Vector(4, 2, 8) if k <= 8192 else Vector(2, 2, 8)
