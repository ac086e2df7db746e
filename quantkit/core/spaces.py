"""Spaces of a model that can be rotated in its weights, as data.

Most activations of a transformer are read or written channel by channel somewhere, so that no rotation can pass. Two kinds are
not, and a rotation of them can be written into the float weights once, at no cost at run time (QuaRot, Ashkboos et al. 2024,
section 4; R1 and R2 in SpinQuant, Liu et al. 2024, section 3):

* the *residual stream*, which embeddings and the last linear of each branch write, and which the first linears of each branch
  read through a norm. The gains of these norms have to move into the linears first, because a gain acts on single channels;
* the *value heads* of attention, which mixes tokens and heads, but not the channels of a head.

:mod:`quantkit.discovery` finds them, the calibrator :class:`~quantkit.calibrators.rotate.Rotate` says what to do with them in a
:class:`SpaceRotation`, and :mod:`quantkit.pipeline.rotate` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.rotation import BlockRotation
from quantkit.core.sites import AbsorbRule


@dataclass(frozen=True)
class Gain:
    """Which parameters of a norm scale and shift its channels once they are normalized.

    Attributes:
        weight: name of the parameter that scales, None if there is none.
        rule: how the weight scales: ``"scale"`` by w, ``"offset"`` by 1 + w.
        bias: name of the parameter that is added, None if there is none.
    """

    weight: str | None
    rule: AbsorbRule = "scale"
    bias: str | None = None

    @property
    def neutral(self) -> float:
        """The value of the weight with which it does nothing."""
        return 1.0 if self.rule == "scale" else 0.0


@dataclass(frozen=True)
class ResidualStream:
    """A residual stream that has been proven to rotate as a whole. All names are names of modules in the model.

    Attributes:
        width: its number of channels, H.
        embeddings: embeddings whose rows add up to it.
        writers: linears whose outputs are added to it.
        readers: name of a linear -> name of the norm in front of it, whose gain it has to take over, or None if that norm has
            no parameters. Routers that are no ``nn.Linear`` but multiply their input by a ``weight [E, H]`` are listed as well.
        gains: name of a norm -> its parameters, for every norm with parameters that reads the stream.
    """

    width: int
    embeddings: tuple[str, ...]
    writers: tuple[str, ...]
    readers: Mapping[str, str | None]
    gains: Mapping[str, Gain]


@dataclass(frozen=True)
class ValueHeads:
    """A value projection and the linears behind the attention that reads it, whose inputs rotate with its rows.

    Attributes:
        writer: name of the value projection, or of the fused projection that contains it.
        rows: ``[K]`` int64, the output row of the writer behind each input channel of the readers.
        readers: names of the output projections.
        width: channels in a head; it divides K.
    """

    writer: str
    rows: Tensor
    readers: tuple[str, ...]
    width: int

    @property
    def blocks(self) -> Tensor:
        """``[heads, width]`` int64: the rows of each value head. A head that several query heads read is listed once."""
        return torch.stack(list({int(block[0]): block for block in self.rows.view(-1, self.width)}.values()))


@dataclass(frozen=True)
class SpaceRotation:
    """Which spaces of a model to rotate in its weights, and by which matrices.

    Attributes:
        stream: the residual stream, None to leave it as it is.
        heads: value projections whose heads are rotated, each head by a matrix as wide as itself.
        seed: of the random signs of all these matrices.
        block: channels of the stream that are rotated together, a divisor of its width; None for all of them.
        order: ``[H]`` int64, the channels of the stream block by block; None for blocks of neighbouring channels.
    """

    stream: ResidualStream | None = None
    heads: tuple[ValueHeads, ...] = ()
    seed: int = 0
    block: int | None = None
    order: Tensor | None = None

    @property
    def of_stream(self) -> BlockRotation:
        """The matrix that the residual stream is multiplied by; only to be asked for if there is a stream."""
        assert self.stream is not None
        return BlockRotation(self.block or self.stream.width, self.seed, self.order)

    def of_heads(self, heads: ValueHeads) -> BlockRotation:
        """The matrix that each head of ``heads`` is multiplied by."""
        return BlockRotation(heads.width, self.seed)

    def space_of(self, linears: Sequence[str]) -> str:
        """In words, for the report, which rotated space all of these linears read; empty if they read none."""
        if self.stream is not None and all(name in self.stream.readers for name in linears):
            return "residual stream"
        width = next((h.width for h in self.heads if set(linears) <= set(h.readers)), None)
        return "" if width is None else f"heads of {width}"
