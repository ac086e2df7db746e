"""Sites as data: which linears read one activation, and who wrote it.

A *site* is one activation tensor, ``x [..., K]``, that feeds one or more linears. All of them must agree on any
rewrite of its channels. Discovery finds sites by probing; a user may also write them by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Producer:
    """The module whose output rows carry the channels of a site.

    Attributes:
        module: its name in the model.
        kind: ``"norm"`` (per-channel parameters) or ``"linear"`` (rows of a weight).
        rows: ``[K]`` int64, the output row that feeds each channel of the site. Grouped-query attention repeats rows.
        power: the site scales with the row to this power: 1, or 2 behind a squared ReLU.
        parameters: for a norm, how each per-channel parameter p absorbs a factor c: ``"scale"`` p*c, ``"offset"``
            (1+p)*c - 1, the convention of Gemma.
        bias: the parameter that adds to each row and so takes over a shift of the site's channels; None where what lies
            between would not carry it, or where a linear of the site has no bias to make up for it.
    """

    module: str
    kind: Literal["norm", "linear"]
    rows: Tensor
    power: int = 1
    parameters: dict[str, Literal["scale", "offset"]] = field(default_factory=dict)
    bias: str | None = None


@dataclass(frozen=True)
class Carriers:
    """Linears whose output rows bring the channels of a site, so that reordering these rows reorders the channels.

    Attributes:
        rows: name of the linear and ``[K]`` int64, the row behind each channel. A linear may occur twice, with a gate and
            what it multiplies in one weight; grouped-query attention repeats rows.
        span: channels may change places within runs of so many.
    """

    rows: tuple[tuple[str, Tensor], ...]
    span: int

    def sources(self, permutation: Tensor) -> dict[str, Tensor] | None:
        """Linear -> ``[n]`` int64, which old row its first n new ones are, so that channel i arrives as ``permutation[i]``
        did; None if channels leave their run, or channels that share a row go different ways."""
        here = torch.arange(len(permutation), device=permutation.device)
        if bool((permutation // self.span != here // self.span).any()):
            return None
        sources: dict[str, Tensor] = {}
        for name, rows in self.rows:
            rows = rows.to(permutation.device)
            source = sources.get(name, rows.new_empty(0))
            more = torch.arange(len(source), int(rows.max()) + 1, device=rows.device)
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
        linears: every linear that reads it, quantized or not.
        taps: one linear for each distinct tensor of the site; their inputs make up its statistics.
        channels: K.
        producer: who wrote it, when a scale may be folded there.
        reason: why it has no producer, for the report.
        carriers: whose rows may be reordered, when discovery was asked and found some.
    """

    name: str
    linears: tuple[str, ...]
    taps: tuple[str, ...]
    channels: int
    producer: Producer | None = None
    reason: str = ""
    carriers: Carriers | None = None

    def tie(self, values: Tensor) -> Tensor:
        """The largest of ``values [K]`` over the channels that share a producer row, for each channel.

        A scale can be folded only if such channels agree (methods: reduce the statistics, not the scale).
        """
        if self.producer is None:
            return values
        rows = self.producer.rows.to(values.device)
        top = torch.full((int(rows.max()) + 1,), float("-inf"), device=values.device, dtype=values.dtype)
        return top.scatter_reduce(0, rows, values, "amax")[rows]


@dataclass(frozen=True)
class Discovery:
    """What the probe found: the sites, and the linears that stay in floating point, each with the reason."""

    sites: tuple[Site, ...]
    kept: dict[str, str]
