"""What a site's activation looked like over the calibration data: small, mergeable, saveable.

A :class:`Statistic` is a monoid: updating with batches in any split, and merging the parts in any order, gives the
same value. It holds O(K) numbers (or O(K^2) for a Hessian), never the activations themselves. After a
:class:`~quantkit.transform.Transform` it is carried over in closed form, so that one pass over the data
serves several calibrators.
"""

from __future__ import annotations

from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.transform import Transform

S = TypeVar("S", bound="Statistic")


@runtime_checkable
class Statistic(Protocol):
    """One accumulator of one site. Third parties may add their own: a calibrator lists the classes it needs."""

    def update(self, x: Tensor) -> None:
        """Take in ``x [T, K]``, any floating dtype, finite."""

    def merge(self: S, other: S) -> S:
        """The statistic of both data sets together."""

    def after(self: S, transform: Transform) -> S:
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
            raise CalibrationError("a per-channel range cannot be carried through a rotation, which mixes channels")
        out = Range(len(self.low), self.low.device)
        ends, _ = transform.activation(torch.stack([self.low, self.high]))
        out.low, out.high = ends[0], ends[1]
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}


class TokenSample:
    """A uniform sample of at most ``size`` tokens, ``[n, K]``, and the number of tokens seen.

    Each token draws a random key and the smallest keys stay, so a merge of samples is a sample of the union. The
    tokens keep the dtype in which they came. Rare tokens matter for ranges: use :class:`Range` for extremes.
    """

    size = 256

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.tokens = torch.empty(0, channels, device=device)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.seen = 0
        self._random = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor) -> None:
        self.seen += len(x)
        keys = torch.rand(len(x), generator=self._random, dtype=torch.float64)
        keep = keys.argsort()[: self.size]  # never copy more of a batch than could survive
        self._take(x[keep.to(x.device)].to(self.tokens.device), keys[keep])

    def merge(self, other: TokenSample) -> TokenSample:
        out = type(self)(self.tokens.shape[1], self.tokens.device)
        out.tokens, out.keys, out.seen = self.tokens, self.keys, self.seen + other.seen
        out._take(other.tokens, other.keys)
        return out

    def _take(self, tokens: Tensor, keys: Tensor) -> None:
        keys = torch.cat([self.keys, keys])
        keep = keys.argsort()[: self.size]
        if not len(self.tokens):
            self.tokens = self.tokens.to(tokens.dtype)
        self.keys, self.tokens = keys[keep], torch.cat([self.tokens, tokens])[keep.to(tokens.device)]

    def after(self, transform: Transform) -> TokenSample:
        out = type(self)(self.tokens.shape[1], self.tokens.device)
        out.keys, out.seen = self.keys, self.seen
        out.tokens, _ = transform.activation(self.tokens.float())
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {"tokens": self.tokens, "keys": self.keys, "seen": torch.tensor(self.seen)}
