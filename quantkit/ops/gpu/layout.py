"""How codes lie in memory, which those that make them and those that multiply them have to agree on.

A row of K codes is int8, padded with zeros to whole steps of 16 bytes: that is what wide loads, and the tensor memory
accelerator of Hopper, move at a time. Where groups of channels have scales of their own, each group starts at such a step, or
at a multiple of :data:`BLOCK` where Hopper's kernels multiply it. Channels that are multiplied in floating point beside the
codes lie in a matrix of their own, padded to whole steps of :data:`SIDE` columns.
"""

from __future__ import annotations

from torch import Tensor

SIDE = 64
"""Columns of the side product come in steps of so many: 128 bytes in 16 bit, as wide as a row of codes in the ring."""

BLOCK = 128
"""Codes of a row in a slot of the ring of Hopper's kernels. Groups of channels start at multiples of it there."""

IN_PAIRS = 2**13
"""Places of the longest rows that :mod:`.codes.order` takes, two at a time: of longer ones, two do not fit the registers."""

NORM = 2**15
"""Channels of the longest rows of a norm that is a kernel by itself."""


def ceil_div(n: int, size: int) -> int:
    """How many pieces of ``size`` hold ``n``. Triton's own function takes microseconds, and each launch needs some."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``. Triton's own function takes microseconds, too."""
    return 1 << max(n - 1, 0).bit_length()


def padded(channels: int) -> int:
    """Codes in a row of ``channels``, with the padding."""
    return -(-channels // 16) * 16


def padded_side(columns: int) -> int:
    """Columns of the side product, with the padding."""
    return -(-columns // SIDE) * SIDE


def scale_columns(groups: int) -> int:
    """Columns of the scales of tokens: one, or for more than one group a base scale and the multiplier of each."""
    return 1 if groups == 1 else 1 + groups


def reachable(x: Tensor) -> Tensor:
    """``x [M, K]``, copied where offsets along a row would leave the 32 bits in which the kernels count them."""
    return x if x.stride(1) * x.shape[1] < 2**31 else x.contiguous()
