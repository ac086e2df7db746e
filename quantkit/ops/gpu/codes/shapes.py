"""How many rows, channels and warps a program of each kernel has: the choice of shapes for the kernels that make codes.

All numbers were found on an H100. No choice changes a bit of the results.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from quantkit.ops.gpu.devices import PROCESSORS
from quantkit.ops.gpu.layout import power_of_two

LINE = 64
"""Channels of a line of :mod:`.rows` and :mod:`.order`; in a rotation by longer blocks, a line of ``rows`` is a block."""

LEAST_ROTATION, LARGEST_ROTATION = 8, 256
"""Channels of a block of the rotation in :mod:`.rows`."""

LEAST, LARGEST = 512, 2**15
"""Channels of a row in :mod:`.rows`: fewer leave most lines empty, more do not fit the registers."""

MOST_GROUPS = 32
"""Groups of channels in :mod:`.rows` and :mod:`.order`: the threads of a warp look for their ranges side by side."""

RING = 2
"""Rows that :mod:`.rows` has on their way in shared memory."""

FEW, FEW_IN_GROUPS = 32, 4
"""So few rows are put in order sooner by :mod:`.rows`, each by a program of its own, than by :mod:`.order`."""


@dataclass(frozen=True)
class Portable:
    """A program of :mod:`.portable`: ``rows`` of ``block`` channels, a power of two that holds the padding as well."""

    rows: int
    block: int
    warps: int


@functools.cache
def portable(places: int, in_groups: bool, warps: int = 0) -> Portable:
    """The program for rows of ``places`` codes; ``in_groups`` it takes one row. ``warps`` 0 is decided here."""
    block = max(power_of_two(places), 16)
    rows = 1 if in_groups else max(1, 1024 // block)
    return Portable(rows, block, warps or min(max(rows * block // 512, 4), 16))


@dataclass(frozen=True)
class Rows:
    """How :mod:`.rows` holds a row: ``line`` channels side by side, ``block`` with the padding, by ``warps``.

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


@functools.lru_cache(maxsize=1024)
def rows(places: int, rotation: int, m: int, *, two: bool, gate: bool, order: bool, vectors: bool) -> Rows:
    """The shape for ``m`` rows of ``places`` codes; ``two`` inputs, an ``order`` and ``vectors`` want registers too."""
    line = max(LINE, rotation)
    block = max(power_of_two(places), 16 * line)
    warps = min(block // 1024, block // (16 * line), 16)
    # 16 warps fill the registers of a processor. Two short rows are fetched too slowly by so few.
    programs = PROCESSORS * (8 if two and warps < 16 else 16 // warps)
    many, room = m > programs, block <= 1024 * warps
    crowded = gate and vectors and warps == 16
    ring = crowded or (many and room and (order or (gate and warps == 16)))
    ahead = many and room and not (two and warps == 16) and (vectors or block > 8192)
    return Rows(line, block, warps, programs, ahead, ring, two, crowded)


def order_warps(block: int) -> int:
    """Warps of a program of :mod:`.order` for rows of ``block`` places: one warp alone would gather without shared memory."""
    return max(block // 512, 2)
