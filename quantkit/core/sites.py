"""Sites as data: which linears read one activation, which module wrote it, and why some linears are left alone.

A *site* is one activation tensor, ``x [..., K]``, that feeds one or more linears. Whatever is done to its K channels, such as
dividing them by a scale, has to be made up for in the weights of every linear that reads them, so these linears share one
decision. If the module that wrote the activation can be found, it can do the dividing itself, for nothing: a scale is *folded*
into this *producer*. If only the order of the channels is to change, more modules qualify; these are the *carriers*.

:func:`quantkit.discover` finds all of this by running the model (see :mod:`quantkit.discovery`); it may also be written by
hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

AbsorbRule = Literal["scale", "offset"]
"""How a parameter of a norm enters its output: ``"scale"`` as p, ``"offset"`` as 1 + p (the convention of Gemma)."""


def absorb(parameter: Tensor, factor: Tensor, rule: AbsorbRule) -> Tensor:
    """What a norm's parameter ``[K]`` has to become so that the output of the norm is multiplied by ``factor [K]``.

    The result has the dtype that the two promote to: ``p * c`` for ``"scale"``, and ``(1 + p) * c - 1`` for ``"offset"``.
    """
    return parameter * factor if rule == "scale" else (1 + parameter) * factor - 1


@dataclass(frozen=True)
class Producer:
    """The module whose output rows are the channels of a site, each possibly multiplied by something that is no channel's own.

    If an output row is multiplied by c, the site's channels that it feeds are multiplied by ``c ** power``, and nothing else in
    the model changes. That has been proven before a producer is written down.

    Attributes:
        module: its name in the model.
        kind: ``"norm"`` for a module with parameters for each channel, ``"linear"`` for the rows of a weight.
        rows: ``[K]`` int64, the output row that feeds each channel of the site. With grouped-query attention, where several
            query heads read one value head, rows occur more than once.
        power: 1 nearly always; 2 behind a squared ReLU.
        parameters: for a norm, how each of its parameters for channels takes a factor over, see :func:`absorb`. Empty for a
            linear.
        bias: name of the parameter that adds to each row, so that the shift of a channel can be folded into it. None where
            there is none, where the shift would not arrive unchanged, or where a linear of the site has no bias of its own
            to make up for the shift.
    """

    module: str
    kind: Literal["norm", "linear"]
    rows: Tensor
    power: int = 1
    parameters: dict[str, AbsorbRule] = field(default_factory=dict)
    bias: str | None = None


@dataclass(frozen=True)
class Carriers:
    """The linears whose output rows have to be reordered so that the channels of a site arrive in another order.

    There may be several, since a product of two activations has its channels in a new order only if both factors have.

    Attributes:
        rows: pairs of the name of a linear and ``[K]`` int64, its output row behind each channel. A linear occurs twice if
            it computes both a gate and what the gate multiplies. With grouped-query attention, rows repeat.
        span: channels may change places within runs of this many consecutive channels, and not beyond: K if all may, the
            width of a head behind attention.
    """

    rows: tuple[tuple[str, Tensor], ...]
    span: int

    def sources(self, permutation: Tensor) -> dict[str, Tensor] | None:
        """How the rows of each linear have to be reordered so that the channels arrive in the order of ``permutation``.

        Args:
            permutation: ``[K]`` int64; the new channel i is to be the old channel ``permutation[i]``.

        Returns:
            Name of a linear -> ``[n]`` int64: its new row i, for the first n rows, is its old row ``source[i]``; the rows
            from n on stay where they are. None if this order cannot be brought about: because a channel would leave its
            run of ``span``, or because two channels that are fed by one row would need different rows.
        """
        here = torch.arange(len(permutation), device=permutation.device, dtype=torch.int64)
        if bool((permutation // self.span != here // self.span).any()):
            return None
        sources: dict[str, Tensor] = {}
        for name, rows in self.rows:
            rows = rows.to(permutation.device)
            source = sources.get(name, rows.new_empty(0))
            more = torch.arange(len(source), int(rows.max()) + 1, device=rows.device, dtype=torch.int64)
            source = torch.cat([source, more])
            source[rows] = rows[permutation]
            if not torch.equal(source[rows], rows[permutation]):
                return None
            sources[name] = source
        return sources


@dataclass(frozen=True)
class Site:
    """One activation tensor and everything that reads it.

    Attributes:
        name: the name of its first linear.
        linears: names of all linears that read it, in the order of the model, whether they are quantized or not.
        taps: some of these linears: one for each distinct tensor. One norm called at two places writes two tensors, which
            belong to one site because the parameters are shared. Statistics are collected at the taps.
        channels: the number of channels, K.
        producer: the module that wrote it, if scales can be folded there.
        reason: in words, why it has no producer; empty if it has one.
        carriers: the linears whose rows can be reordered in place of its channels; None if there are none, or if discovery
            was not asked for them.
    """

    name: str
    linears: tuple[str, ...]
    taps: tuple[str, ...]
    channels: int
    producer: Producer | None = None
    reason: str = ""
    carriers: Carriers | None = None

    def tie(self, values: Tensor) -> Tensor:
        """``values [K]``, with each replaced by the largest among the channels that are fed by the same row of the producer.

        Only a scale that is the same for such channels can be folded. Calibrators make it so by calling this on the
        statistics that the scale is computed from, rather than on the scale.
        """
        if self.producer is None:
            return values
        rows = self.producer.rows.to(values.device)
        top = torch.full((int(rows.max()) + 1,), float("-inf"), device=values.device, dtype=values.dtype)
        return top.scatter_reduce(0, rows, values, "amax")[rows]


class Kept(StrEnum):
    """Why discovery leaves a linear in floating point. A member is also its sentence, for reports and JSON."""

    ADAPTER = "part of an adapter"
    TIED = "its weight is tied to another module"
    READ = "other code of the model reads its weight"
    WRITTEN = "the model's own forward writes to its weight"
    HEAD = "output head"
    ROUTER = "router"
    FLOAT32 = "the model asks for it in float32"
    NEVER_RAN = "it never ran in the probe"

    __repr__ = str.__repr__  # a printed dict of reasons reads as text


@dataclass(frozen=True)
class Discovery:
    """What :func:`quantkit.discover` found.

    Attributes:
        sites: every activation that linears read, but for those that only linears in ``kept`` read.
        kept: name of a linear -> why it stays in floating point unless the user asks for it.
    """

    sites: tuple[Site, ...]
    kept: dict[str, Kept]
