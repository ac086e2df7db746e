"""Which kernel runs which shape: a small table for each architecture, which ``quantkit tune`` can refine for one device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from quantkit.ops.gpu.hopper import Decode, Gemm


@dataclass(frozen=True)
class Tile:
    """The portable kernel: tiles of ``m x n``, ``k`` of K at a time."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int


Config = Tile | Gemm | Decode
PROGRAMS = 120
"""As many tiles keep a Hopper GPU (132 processors) busy; with fewer, smaller tiles win."""

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


def portable(arch: int, m: int, n: int, *, two_sums: bool = False) -> Tile:
    """A tile of the kernel that runs everywhere; segments and side products hold a second accumulator in registers."""
    for limit, tile in TILES.items():
        if m <= limit:
            return tile
    if m <= 128 or -(-m // 128) * -(-n // 256) < PROGRAMS:
        return Tile(128, 64, 128, 8, 4, 4) if arch != 89 else Tile(128, 64, 64, 8, 4, 4)
    if two_sums:
        return LARGE[89]
    return LARGE[max((a for a in LARGE if a <= arch), default=80)]


def choose(arch: int, m: int, n: int, k: int, *, tma: bool) -> Config:
    """The kernel for ``[m, k] x [n, k]^T``; ``tma`` says whether the operands obey its rules (see :mod:`.hopper`)."""
    if arch != 90 or not tma:
        return portable(arch, m, n)
    for tokens, stages in ((8, 10), (16, 10), (32, 8), (64, 6)):
        if m <= tokens:
            return Decode(tokens, stages)
    if m <= 128:
        return Decode(128, 8, 128) if n <= 8192 else Gemm(128, 6, early=True)
    for config in (Gemm(256, 4, group=16, early=True), Gemm(128, 6)):
        if -(-m // 128) * -(-n // config.columns) >= PROGRAMS:
            return config
    return Gemm(64, 8)


def vector(k: int, *, given: bool = False) -> tuple[int, int, int]:
    """Rows at a time, groups and warps of the product with one token of ``k`` channels, quantized before or on the way in."""
    if given:
        return (8, 1, 4) if k <= 8192 else (2, 1, 16)
    return (8, 2, 4) if k <= 8192 else (2, 2, 16)
