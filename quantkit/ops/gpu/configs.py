"""Which kernel runs which shape: a small table for each architecture, which ``quantkit tune`` refines for one device."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit._version import __version__

log = logging.getLogger("quantkit")


@dataclass(frozen=True)
class Tile:
    """The portable kernel (:mod:`.matmul`): tiles of ``m x n``, ``k`` of K at a time, ``group`` row tiles sharing columns."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Gemm:
    """Many tokens on Hopper (:mod:`.hopper`): tiles of 128 x ``columns``; ``group`` row tiles share columns in L2."""

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
    """Few tokens on Hopper: 64 weight rows by ``tokens`` tokens, ``block_k`` of K in each of ``stages``."""

    tokens: int
    stages: int
    block_k: int = 256
    early: bool = True

    def registers(self, segments: int = 1) -> int:
        """For each thread; the accumulators alone take half a ``tokens``."""
        return 128 if self.tokens < 128 and segments == 1 else 192

    @property
    def staged(self) -> bool:
        """Whether 16-bit results leave through shared memory, which pays from a hundred tokens."""
        return self.tokens >= 128


@dataclass(frozen=True)
class Vector:
    """One token (:mod:`.gemv`): ``groups`` times ``rows`` outputs a program."""

    rows: int
    groups: int
    warps: int


def padded(channels: int) -> int:
    """Codes in a row: 16 bytes at a time is what wide loads and TMA move."""
    return -(-channels // 16) * 16


SIDE = 64
"""Outlier columns come in steps of so many: 128 bytes in 16 bit, as wide as a row of codes in a slot of the ring."""


BLOCK = 128
"""Codes of a row in a slot of the ring: clusters of channels start at multiples of it where Hopper's kernels multiply them."""


def padded_side(columns: int) -> int:
    """Outlier columns as the kernels take them."""
    return -(-columns // SIDE) * SIDE


Config = Tile | Gemm | Decode | Vector
KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (Tile, Gemm, Decode, Vector)}
PROGRAMS = 120
"""As many tiles keep a Hopper GPU (132 processors) busy; with fewer, smaller tiles win."""

PROCESSORS = 132
"""Of a Hopper GPU."""
IN_PAIRS = 2**13
"""Places of the longest rows that :mod:`.order` takes, two at a time: of longer ones, two do not fit the registers."""
GEMMS = (Gemm(256, 4, group=16, early=True), Gemm(128, 6), Gemm(64, 8))
RINGS = {d.tokens: d for d in (Decode(8, 12), Decode(16, 10), Decode(32, 8), Decode(64, 6), Decode(128, 8, 128))}

TILES = {16: Tile(16, 64, 128, 8, 4, 6), 32: Tile(32, 64, 128, 8, 4, 5), 64: Tile(64, 64, 128, 8, 4, 4)}
LARGE = {
    80: Tile(128, 256, 64, 8, 8, 4),  # A100: 164 KiB of shared memory
    89: Tile(128, 128, 64, 8, 8, 4),  # L4, 4090: 100 KiB
    90: Tile(128, 256, 128, 8, 8, 4),
    100: Tile(128, 256, 128, 8, 8, 3),
}


@functools.cache
def capability(device: torch.device) -> int:
    """80 for A100, 89 for L4 and 4090, 90 for H100; 0 under Triton's interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def portable(arch: int, m: int, n: int, *, segments: bool = False) -> Tile:
    """A tile of the kernel that runs everywhere; segments, or active columns, want registers besides the accumulator."""
    for limit, tile in TILES.items():
        if m <= limit:
            return tile
    if m <= 128 or -(-m // 128) * -(-n // 256) < PROGRAMS:
        return Tile(128, 64, 128, 8, 4, 4) if arch != 89 else Tile(128, 64, 64, 8, 4, 4)
    if segments:
        return LARGE[89]
    return LARGE[max((a for a in LARGE if a <= arch), default=80)]


def hopper(m: int, n: int, *, segments: bool = False) -> Gemm | Decode:
    """The kernel of :mod:`.hopper` for ``m`` tokens and ``n`` rows of the weight.

    Many tokens take the tile that gets through in the least time: rounds over the processors times the columns of a tile,
    and what a tile costs besides.
    """
    if m <= (64 if segments else 128):  # the widest ring has no registers left
        tokens = next(t for t in RINGS if m <= t)
        if m > 8 and 2 * -(-n // 64) <= PROCESSORS:
            tokens //= 2  # two groups of tokens run side by side
        return RINGS[tokens]
    return min(GEMMS, key=lambda c: -(-(-(-m // 128) * -(-n // c.columns)) // PROCESSORS) * (c.columns + 32))


def vector(k: int, *, given: bool = False, segments: bool = False) -> Vector:
    """The product with one token of ``k`` channels, quantized before (``given``, maybe in ``segments``) or on the way in."""
    if segments:
        return Vector(4, 1, 4) if k <= 8192 else Vector(4, 1, 16)
    if given:
        return Vector(8, 1, 4) if k <= 8192 else Vector(2, 1, 16)
    return Vector(8, 2, 4) if k <= 4096 else Vector(4, 2, 8) if k <= 8192 else Vector(2, 2, 8)


def choose(device: torch.device, m: int, n: int, k: int, *, tma: bool = False, segments: bool = False) -> Tile | Gemm | Decode:
    """The kernel for ``[m, k] x [n, k]^T``, the same bits whichever it is.

    Args:
        tma: the operands obey the rules of :mod:`.hopper`, which is there.
        segments: K comes in segments.
    """
    if not segments:
        config = tuned_config(device, m, n, k)
        # few tokens in a Gemm: the next larger number that was tuned is far away, and the table knows better
        if isinstance(config, Tile) or (tma and isinstance(config, Decode if m <= 64 else Gemm | Decode)):
            return config
    arch = capability(device)
    return hopper(m, n, segments=segments) if arch == 90 and tma else portable(arch, m, n, segments=segments)


# ---- what quantkit tune found


def cache_path(device: torch.device) -> Path:
    """The file of tuned choices for this device, Triton and quantkit; under ``QUANTKIT_CACHE`` or ``~/.cache/quantkit``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = (name, f"triton-{version('triton')}", f"quantkit-{__version__}")
    return Path(os.environ.get("QUANTKIT_CACHE") or home) / (re.sub(r"[^\w.-]+", "-", "_".join(parts)).lower() + ".json")


@functools.cache
def tuned(device: torch.device) -> dict[tuple[int, int], list[tuple[int, Config]]]:
    """(N, K) -> (most tokens, choice), ascending. A file that cannot be read counts as none, and is named in the log."""
    if device.type != "cuda":
        return {}
    path = cache_path(device)
    try:
        if not path.exists():
            return {}
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "%s is not a table of `quantkit tune` (%s): the built-in one is used. Tune again or delete it.", path, error
        )
        return {}


def tuned_config(device: torch.device, m: int, n: int, k: int) -> Config | None:
    """The tuned choice for the next larger number of tokens that was measured."""
    return next((config for most, config in tuned(device).get((n, k), ()) if m <= most), None)


def parse(table: dict[str, dict[str, dict[str, Any]]]) -> dict[tuple[int, int], list[tuple[int, Config]]]:
    """``{"NxK": {"tokens": {"kernel": ..., ...}}}`` as the kernels' dataclasses."""
    out = {}
    for shape, rows in table.items():
        n, k = map(int, shape.split("x"))
        found = []
        for tokens, fields in rows.items():
            kind = KINDS[fields["kernel"]]
            found.append((int(tokens), kind(**{name: value for name, value in fields.items() if name != "kernel"})))
        out[n, k] = sorted(found, key=lambda row: row[0])
    return out


def as_json(config: Config) -> dict[str, Any]:
    """What :func:`parse` reads."""
    return {"kernel": type(config).__name__} | asdict(config)
