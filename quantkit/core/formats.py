"""Number formats as values: what kind of number, which elements share a scale, and how codes are stored.

A tensor is either left in floating point, :class:`Float`, or it is :class:`Quantized`. What is quantized consists of three
independent facts:

- the *number* that stands for a value: :class:`Int`, with some bits, with or without a zero point;
- the *granularity*, which says which elements share a scale: the whole tensor (:class:`PerTensor`), each token of an activation
  (:class:`PerToken`), or each output channel of a weight (:class:`PerChannel`, :class:`PerGroup`);
- the *storage* of the codes, :class:`Storage`: one in a byte, or two.

Any of the granularities may be refined by *groups*: consecutive input channels that have a scale of their own. The scales of
the groups of a row (or of a token) are whole multiples of one *base scale*, so that sums over all channels stay exact integers;
see :mod:`quantkit.core.groups`.

A format says nothing about hardware. Whether something runs as it says is the answer of a backend about an operand, see
:mod:`quantkit.ops.table`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import get_args

import torch
from torch import Tensor

from quantkit.core.errors import SchemeError


@dataclass(frozen=True)
class Int:
    """Signed whole numbers of a few bits.

    Symmetric codes go from ``-qmax`` to ``qmax``: -128 is left out, so that the negative of each code exists. Asymmetric ones
    use all codes, and have a zero point among them.

    Args:
        bits: 2 to 8.
        symmetric: whether there is no zero point.

    Raises:
        SchemeError: bits is something else.
    """

    bits: int = 8
    symmetric: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise SchemeError(f"Int(bits={self.bits!r}): bits are whole numbers from 2 to 8")
        if not isinstance(self.symmetric, bool):
            raise SchemeError(f"Int(symmetric={self.symmetric!r}): True for no zero point, False for one")

    @property
    def qmax(self) -> int:
        """The largest code: 127 for 8 bits, 7 for 4."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def lowest(self) -> int:
        """The least code: -127 for 8 symmetric bits, -128 for 8 asymmetric ones."""
        return -self.qmax if self.symmetric else -self.qmax - 1

    @property
    def reach(self) -> int:
        """The largest absolute value of a code less its zero point, which is what a product adds up: 127, or 255."""
        return self.qmax if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True)
class Float:
    """Left in floating point, in whatever dtype it has."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor. Of an activation it is fixed at calibration (*static*).

    Attributes:
        groups: sizes of the groups of input channels that have a scale of their own; empty for one scale.
    """

    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class PerToken:
    """One scale for each token of an activation, found when the token comes (*dynamic*).

    Attributes:
        groups: sizes of the groups of input channels that have a scale of their own; empty for one scale.
    """

    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel, which is a row, of a weight.

    Attributes:
        groups: sizes of the groups of input channels that have a multiplier of their own; empty for one scale.
    """

    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class PerGroup:
    """A scale for each row of a weight and each ``size`` consecutive input channels; the last group may be shorter.

    The scale is one float32 for the row times a small whole number for the group, its multiplier, which is an int8.

    Raises:
        SchemeError: size is no whole number above 0.
    """

    size: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise SchemeError(f"PerGroup(size={self.size!r}): a group has a whole number of channels, such as 128")


Granularity = PerTensor | PerToken | PerChannel | PerGroup


class Storage(Enum):
    """How the codes of a row lie in memory and in files."""

    BYTES = "int8"
    """One code in a byte, int8."""
    NIBBLES = "int4x2"
    """Two codes of up to 4 bits in a byte, uint8, in two's complement: the first, third, ... channel in the low half of a byte,
    the channel behind it in the high half. A row of an odd number of channels ends with half a byte of 0."""

    def width(self, channels: int) -> int:
        """Bytes in a row of ``channels`` codes."""
        return channels if self is Storage.BYTES else -(-channels // 2)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored bytes."""
        return torch.int8 if self is Storage.BYTES else torch.uint8

    def pack(self, codes: Tensor) -> Tensor:
        """Codes ``[..., K]`` int8 as they are stored, ``[..., width(K)]``."""
        if self is Storage.BYTES:
            return codes
        even = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8)
        return even[..., 0::2] & 15 | even[..., 1::2] << 4

    def unpack(self, stored: Tensor, channels: int) -> Tensor:
        """The codes ``[..., K]`` int8 of what is stored."""
        if self is Storage.BYTES:
            return stored
        signed = stored.view(torch.int8)
        return torch.stack([signed << 4 >> 4, signed >> 4], -1).flatten(-2)[..., :channels]  # shifts of int8 keep the sign


@dataclass(frozen=True)
class Quantized:
    """A tensor of codes.

    Attributes:
        number: what a code is.
        granularity: which elements share a scale.
        storage: how codes lie in memory.

    Raises:
        SchemeError: the storage has no room for the number.
    """

    number: Int = Int()
    granularity: Granularity = PerChannel()
    storage: Storage = Storage.BYTES

    def __post_init__(self) -> None:
        if self.storage is Storage.NIBBLES and self.number.bits > 4:
            raise SchemeError(f"{self.number} does not fit two in a byte, which takes codes of up to 4 bits")

    @property
    def is_static(self) -> bool:
        """Whether an activation of this format has scales that were fixed at calibration."""
        return isinstance(self.granularity, PerTensor)

    @property
    def takes_threshold(self) -> bool:
        """Whether columns may leave the product at run time, where they reach a threshold: a scale per token lets them."""
        return self.number.symmetric and not self.is_static

    def groups(self, channels: int) -> tuple[int, ...]:
        """Sizes of the groups of ``channels`` input channels, in order; empty where all of them share a scale."""
        if not isinstance(self.granularity, PerGroup):
            return self.granularity.groups
        whole, rest = divmod(channels, self.granularity.size)
        return (self.granularity.size,) * whole + ((rest,) if rest else ())

    def in_groups(self, groups: tuple[int, ...]) -> Quantized:
        """This format with scales of their own for groups of these sizes; an empty tuple changes nothing.

        Raises:
            SchemeError: it has groups of its own already.
        """
        if not groups:
            return self
        if isinstance(self.granularity, PerGroup) or self.granularity.groups:
            raise SchemeError(f"{self.granularity} has groups of its own, and cannot be divided into {len(groups)} others")
        return replace(self, granularity=replace(self.granularity, groups=groups))

    @property
    def without_groups(self) -> Quantized:
        """This format without groups of sizes that were given one by one; those of :class:`PerGroup` belong to it."""
        if isinstance(self.granularity, PerGroup):
            return self
        return replace(self, granularity=replace(self.granularity, groups=()))


Format = Quantized | Float
FORMAT_KINDS: tuple[type, ...] = (Float, Quantized, Int, Storage, *get_args(Granularity))
"""All kinds of values that a format is made of."""


def groups_fault(groups: object, channels: int) -> str | None:
    """What is wrong with ``groups`` as sizes of groups of ``channels``, if anything."""
    if not isinstance(groups, tuple) or not all(type(size) is int and size > 0 for size in groups):
        return f"groups is {groups!r}, not a tuple of positive sizes"
    if sum(groups) != channels:
        return f"groups {groups} sum to {sum(groups)}, not to the {channels} channels"
    return None
