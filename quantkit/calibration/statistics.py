"""What is kept of an activation: not its values, but a few numbers about them.

A :class:`Statistic` takes in an activation batch by batch and keeps O(K) numbers for K channels (or O(K^2) for a Hessian),
whatever the amount of data. It has two properties that make it useful. It does not matter how the data is divided into batches,
and statistics of two parts can be merged into that of the whole. And when a calibrator decides to transform the channels, the
statistic of the transformed activation follows from that of the original (:meth:`Statistic.after`), so that one pass over the
data serves several calibrators, one after the other.
"""

from __future__ import annotations

from typing import Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor

from quantkit.core.errors import MethodError
from quantkit.core.transform import Transform

S = TypeVar("S", bound="Statistic")


@runtime_checkable
class Statistic(Protocol):
    """Something accumulated over one activation. A calibrator lists the classes it needs, which may be its own."""

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        """Start with nothing seen, for activations with ``channels`` channels on ``device``. ``seed`` is for random choices."""

    def update(self, x: Tensor) -> None:
        """Take in ``x [T, K]``, any floating dtype, finite."""

    def merge(self, other: Self) -> Self:
        """The statistic of both data sets together."""

    def after(self, transform: Transform) -> Self:
        """The statistic of the transformed activation. Raises MethodError if it does not follow from this one."""

    def tensors(self) -> dict[str, Tensor]:
        """All numbers in it, by name."""


class Range:
    """The least and the largest value of each channel.

    Attributes:
        low, high: ``[K]`` float32; inf and -inf for a channel of which nothing was seen.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.low = torch.full((channels,), float("inf"), device=device, dtype=torch.float32)
        self.high = torch.full((channels,), float("-inf"), device=device, dtype=torch.float32)

    @property
    def absmax(self) -> Tensor:
        """The largest absolute value of each channel, ``[K]`` float32; 0 for a channel of which nothing was seen."""
        return torch.maximum(self.low.abs(), self.high.abs()).where(self.high >= self.low, 0.0)

    def update(self, x: Tensor) -> None:
        if len(x):
            low, high = torch.aminmax(x, dim=0)
            self.low, self.high = torch.minimum(self.low, low.float()), torch.maximum(self.high, high.float())

    def merge(self, other: Range) -> Range:
        out = Range(len(self.low), self.low.device)
        out.low, out.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return out

    def after(self, transform: Transform) -> Range:
        if transform.rotation is not None:
            raise MethodError("a rotation mixes channels: a per-channel range cannot be carried through it, a TokenSample can")
        out = Range(len(self.low), self.low.device)
        ends, _ = transform.activation(torch.stack([self.low, self.high]))
        out.low, out.high = ends[0], ends[1]
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}


class TokenSample:
    """A weighted sample of tokens, in which the rare ones with the largest values are always contained.

    The ``extremes`` tokens with the largest absolute values are kept, because they decide ranges. Of all others a uniform
    sample of ``size`` tokens is kept: each draws a random key, and those with the smallest keys stay. That way the merge of two
    samples is a sample of both data sets together.

    Attributes:
        common: ``[n, K]``, the uniform sample, in the dtype in which tokens came.
        keys: ``[n]`` float64, their random keys.
        rare: ``[m, K]``, the tokens with the largest values.
        seen: the number of all tokens.
    """

    size, extremes = 256, 64

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.common = torch.empty(0, channels, device=device, dtype=torch.float32)
        self.keys = torch.empty(0, dtype=torch.float64, device="cpu")
        self.rare = torch.empty(0, channels, device=device, dtype=torch.float32)
        self.seen = 0
        self._random = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor) -> None:
        self.seen += len(x)
        order = x.abs().amax(1).argsort(descending=True, stable=True)
        rare, rest = x[order[: self.extremes]], order[self.extremes :]
        keys = torch.rand(len(rest), generator=self._random, dtype=torch.float64, device="cpu")
        keep = keys.argsort()[: self.size]  # no other token of this batch could stay, so no other is copied
        self._take_rare(rare)
        self._take_common(x[rest[keep.to(x.device)]], keys[keep])

    def merge(self, other: TokenSample) -> TokenSample:
        out = type(self)(self.common.shape[1], self.common.device, int(self.keys.sum() * 2**20))
        out.common, out.keys, out.rare, out.seen = self.common, self.keys, self.rare, self.seen + other.seen
        out._take_rare(other.rare)
        out._take_common(other.common, other.keys)
        return out

    def _take_rare(self, tokens: Tensor) -> None:
        """Keep the tokens with the largest values; those that no longer belong to them draw keys as all others do."""
        both = torch.cat([self.rare.to(tokens.dtype), tokens.to(self.rare.device)])
        order = both.abs().amax(1).argsort(descending=True, stable=True)
        self.rare, dropped = both[order[: self.extremes]], both[order[self.extremes :]]
        self._take_common(dropped, torch.rand(len(dropped), generator=self._random, dtype=torch.float64, device="cpu"))

    def _take_common(self, tokens: Tensor, keys: Tensor) -> None:
        keys = torch.cat([self.keys, keys])
        keep = keys.argsort()[: self.size]
        both = torch.cat([self.common.to(tokens.dtype), tokens.to(self.common.device)])
        self.keys, self.common = keys[keep], both[keep.to(both.device)]

    def weighted(self) -> tuple[Tensor, Tensor]:
        """The sampled tokens ``[n, K]`` float32, and how many tokens of the data each stands for, ``[n]`` float32, ``seen`` in
        sum."""
        each = (self.seen - len(self.rare)) / max(len(self.common), 1)
        weights = torch.cat(
            [
                torch.ones(len(self.rare), dtype=torch.float32, device="cpu"),
                torch.full((len(self.common),), each, dtype=torch.float32, device="cpu"),
            ]
        )
        return torch.cat([self.rare, self.common]).float(), weights.to(self.rare.device)

    def after(self, transform: Transform) -> TokenSample:
        out = type(self)(self.common.shape[1], self.common.device)
        out.keys, out.seen = self.keys, self.seen
        out.common, out.rare = (transform.activation(t.float())[0] for t in (self.common, self.rare))
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {
            "common": self.common,
            "rare": self.rare,
            "keys": self.keys,
            "seen": torch.tensor(self.seen, dtype=torch.int64, device="cpu"),
        }
