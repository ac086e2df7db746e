"""What a site's activation looked like over the calibration data: small, mergeable, saveable.

A :class:`Statistic` is a monoid: updating with batches in any split, and merging the parts in any order, gives the
same value. It holds O(K) numbers (or O(K^2) for a Hessian), never the activations themselves. After a
:class:`~quantkit.core.transform.Transform` it is carried over in closed form, so that one pass over the data
serves several calibrators.
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
    """One accumulator of one site. Third parties may add their own: a calibrator lists the classes it needs."""

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        """Nothing seen yet, for activations of ``channels`` on ``device``; ``seed`` for those that draw."""

    def update(self, x: Tensor) -> None:
        """Take in ``x [T, K]``, any floating dtype, finite."""

    def merge(self, other: Self) -> Self:
        """The statistic of both data sets together."""

    def after(self, transform: Transform) -> Self:
        """The statistic of the transformed activation. Raises MethodError where no closed form exists."""

    def tensors(self) -> dict[str, Tensor]:
        """The numbers, for saving."""


class Range:
    """Per-channel minimum and maximum, ``[K]`` float32."""

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.low = torch.full((channels,), float("inf"), device=device)
        self.high = torch.full((channels,), float("-inf"), device=device)

    @property
    def absmax(self) -> Tensor:
        """``[K]`` float32, 0 for a channel that was never seen."""
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
    """A weighted sample of tokens that does not miss the rare ones that decide ranges.

    Kept are the ``extremes`` tokens with the largest absmax, and of all others a uniform sample of ``size``. Every other
    token draws a random key and the smallest keys stay, so a merge of samples is a sample of the union. Tokens keep the
    dtype in which they came.
    """

    size, extremes = 256, 64

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.common = torch.empty(0, channels, device=device)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rare = torch.empty(0, channels, device=device)
        self.seen = 0
        self._random = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor) -> None:
        self.seen += len(x)
        order = x.abs().amax(1).argsort(descending=True, stable=True)
        rare, rest = x[order[: self.extremes]], order[self.extremes :]
        keys = torch.rand(len(rest), generator=self._random, dtype=torch.float64)
        keep = keys.argsort()[: self.size]  # never copy more of a batch than could survive
        self._take_rare(rare)
        self._take_common(x[rest[keep.to(x.device)]], keys[keep])

    def merge(self, other: TokenSample) -> TokenSample:
        out = type(self)(self.common.shape[1], self.common.device, int(self.keys.sum() * 2**20))
        out.common, out.keys, out.rare, out.seen = self.common, self.keys, self.rare, self.seen + other.seen
        out._take_rare(other.rare)
        out._take_common(other.common, other.keys)
        return out

    def _take_rare(self, tokens: Tensor) -> None:
        """The most extreme stay; those that no longer are join the lottery of the common ones."""
        both = torch.cat([self.rare.to(tokens.dtype), tokens.to(self.rare.device)])
        order = both.abs().amax(1).argsort(descending=True, stable=True)
        self.rare, dropped = both[order[: self.extremes]], both[order[self.extremes :]]
        self._take_common(dropped, torch.rand(len(dropped), generator=self._random, dtype=torch.float64))

    def _take_common(self, tokens: Tensor, keys: Tensor) -> None:
        keys = torch.cat([self.keys, keys])
        keep = keys.argsort()[: self.size]
        both = torch.cat([self.common.to(tokens.dtype), tokens.to(self.common.device)])
        self.keys, self.common = keys[keep], both[keep.to(both.device)]

    def weighted(self) -> tuple[Tensor, Tensor]:
        """Tokens ``[n, K]`` float32 and how many tokens each stands for, ``[n]`` float32; the weights sum to ``seen``."""
        each = (self.seen - len(self.rare)) / max(len(self.common), 1)
        weights = torch.cat([torch.ones(len(self.rare)), torch.full((len(self.common),), each)])
        return torch.cat([self.rare, self.common]).float(), weights.to(self.rare.device)

    def after(self, transform: Transform) -> TokenSample:
        out = type(self)(self.common.shape[1], self.common.device)
        out.keys, out.seen = self.keys, self.seen
        out.common, out.rare = (transform.activation(t.float())[0] for t in (self.common, self.rare))
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {"common": self.common, "rare": self.rare, "keys": self.keys, "seen": torch.tensor(self.seen)}
