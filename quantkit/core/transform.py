"""What a calibrator may decide about the channels of a site, as data that preserves the function.

A linear computes ``y = x W^T + b``. A :class:`Transform` rewrites both sides so that ``y`` stays the same::

    x' = R P ((x - shift) / scale)         W' = R P (W * scale)         b' = b + W shift

with a permutation ``P`` and a block-diagonal orthogonal rotation ``R``, and takes the ``outliers`` channels
out of ``x'`` and ``W'`` into a small side product in the model's own dtype. Calibrators return transforms, :mod:`quantkit.pipeline.fold`
puts what it can into the producer of the site, and :class:`quantkit.W8A8Linear` runs what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from quantkit.core.errors import MethodError


@dataclass(frozen=True)
class Rotation:
    """Block-diagonal orthogonal matrix ``diag(signs) (I kron H)`` with a normalised Hadamard ``H``.

    Attributes:
        block: channels per block, a power of two that divides K.
        signs: ``[K]`` of +-1, applied before the Hadamard product; None for all ones.
    """

    block: int
    signs: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1 or self.block & (self.block - 1):
            raise MethodError(f"Rotation(block={self.block!r}): a Hadamard block is a power of two, as an int")

    def factors(self, k: int) -> Tensor:
        """``[K]`` float64 that values are multiplied by before the butterflies: the signs over ``sqrt(block)``."""
        signs = torch.ones(k) if self.signs is None else self.signs
        return signs.double() / math.sqrt(self.block)

    def apply(self, x: Tensor) -> Tensor:
        """``x R`` for ``x [..., K]``, in the dtype of ``x``.

        Computed in float64 for float64 and in float32 for all others, as butterflies ``(a, b) -> (a + b, a - b)`` of strides
        1, 2, 4, ..., block / 2. That order defines the bits; no token depends on another.
        """
        if x.shape[-1] % self.block:
            raise MethodError(f"Rotation(block={self.block}) does not divide {x.shape[-1]} channels")
        y = x if x.dtype == torch.float64 else x.float()
        y = y * self.factors(x.shape[-1]).to(y)
        stride = 1
        while stride < self.block:
            a, b = y.unflatten(-1, (-1, 2, stride)).unbind(-2)
            y = torch.stack([a + b, a - b], -2).flatten(-3)
            stride *= 2
        return y.to(x.dtype)


def hadamard(n: int) -> Tensor:
    """Normalised Sylvester-Hadamard matrix ``[n, n]`` float64: symmetric and its own inverse."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


@dataclass(frozen=True)
class BlockRotation:
    """Orthogonal matrix R of nearly flat blocks: every channel goes to all others of its block in about equal parts.

    Random signs, then a Hadamard matrix for the largest power of two in ``width`` and a Hartley matrix for the odd rest
    (whose entries are at most ``sqrt(2 / odd)``), then a reflection that takes the image of the all-ones vector back to it.
    So R keeps the mean over channels, and a LayerNorm commutes with it as an RMSNorm does.

    Attributes:
        width: channels of a block, any number.
        seed: of the signs.
        order: ``[n width]`` int64, the channels of the first block, of the second and so on; None as they come.
    """

    width: int
    seed: int = 0
    order: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """``x R`` for each block of ``width`` channels of ``x [..., n width]``, computed in float64."""
        random = torch.Generator().manual_seed(self.seed)
        signs = (torch.randint(0, 2, (self.width,), generator=random) * 2.0 - 1).double().to(x.device)
        axis = torch.full_like(signs, self.width**-0.5)
        normal = self._spread(axis * signs) - axis
        normal = normal / normal.norm().clamp_min(1e-300)  # all signs alike may leave nothing to reflect
        order = None if self.order is None else self.order.to(x.device)
        y = self._spread((x if order is None else x[..., order]).double().unflatten(-1, (-1, self.width)) * signs)
        y = (y - 2 * (y @ normal)[..., None] * normal).flatten(-2)
        return y if order is None else torch.empty_like(y).index_copy_(-1, order, y)

    def _spread(self, x: Tensor) -> Tensor:
        power = self.width & -self.width
        angle = torch.arange(self.width // power, dtype=torch.float64, device=x.device)
        angle = 2 * torch.pi * torch.outer(angle, angle) / len(angle)
        x = x.unflatten(-1, (power, -1)) @ ((angle.cos() + angle.sin()) / len(angle) ** 0.5)
        step = 1
        while step < power:
            a, b = x.unflatten(-2, (-1, 2, step)).unbind(-3)
            x = torch.stack([a + b, a - b], -3).flatten(-4, -2)
            step *= 2
        return x.flatten(-2) / power**0.5


@dataclass(frozen=True)
class Transform:
    """A function-preserving rewrite of the K input channels of a site. Every field is optional.

    Attributes:
        shift: ``[K]`` float32, subtracted from the activation first.
        scale: ``[K]`` float32, positive; SmoothQuant's ``s``.
        outliers: ``[n]`` int64, channels (as the model numbers them) kept in floating point.
        threshold: LLM.int8() as published: channels that reach this absolute value anywhere in a batch leave the INT8 product
            for this batch, and are multiplied with the codes of the weight.
        permutation: ``[K]`` int64, ``x'[i] = x[permutation[i]]``.
        groups: sizes of consecutive clusters of channels, in their new order; they sum to K. Each gets scales of its own.
        rotation: applied last, on what is not an outlier.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    outliers: Tensor | None = None
    permutation: Tensor | None = None
    rotation: Rotation | None = None
    threshold: float | None = None
    groups: tuple[int, ...] | None = None

    @property
    def steps(self) -> list[str]:
        """Names of the fields that do something."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    @property
    def is_identity(self) -> bool:
        """Whether it does nothing."""
        return not self.steps

    def then(self, later: Transform) -> Transform:
        """The transform that applies ``self`` and afterwards ``later``, which sees the channels of ``self``'s output.

        Raises:
            MethodError: ``later`` changes ranges that an earlier rotation has already mixed, or the order within clusters.
        """
        if later.is_identity:
            return self
        if self.rotation is not None:
            raise MethodError(
                "nothing may follow a rotation: it mixes channels, so a later scale, shift, permutation or outlier "
                "choice would act on other channels than it was computed for; put the rotation last"
            )
        if self.groups is not None and later.permutation is not None and later.groups is None:
            raise MethodError(
                "clusters are runs of channels, which another permutation would break up; put the clusters after it"
            )
        order = self.permutation
        shift, scale, outliers = later.shift, later.scale, later.outliers
        if order is not None:  # bring later's vectors back to the model's own numbering
            inverse = torch.argsort(order)
            shift = None if shift is None else shift[inverse]
            scale = None if scale is None else scale[inverse]
            outliers = None if outliers is None else order[outliers]
        if shift is not None and self.scale is not None:
            shift = shift * self.scale
        permutation = later.permutation
        if order is not None:
            permutation = order if permutation is None else order[permutation]
        return Transform(
            shift=_merge(self.shift, shift, torch.add),
            scale=_merge(self.scale, scale, torch.mul),
            outliers=_merge(self.outliers, outliers, lambda a, b: torch.unique(torch.cat([a, b]))),
            threshold=_merge(self.threshold, later.threshold, min),
            permutation=permutation,
            rotation=later.rotation,
            groups=self.groups if later.groups is None else later.groups,
        )

    def activation(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The INT8 side ``x' [..., K]`` (0 at outliers) and the side ``[..., n]`` or None, of ``x [..., K]``."""
        if self.shift is not None:
            x = x - self.shift.to(x)
        if self.scale is not None:
            x = x / self.scale.to(x)
        return self._arrange(x)

    def weight(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """The INT8 side ``W' [N, K]`` and the side ``[N, n]`` or None, of ``w [N, K]``."""
        return self._arrange(w if self.scale is None else w * self.scale.to(w))

    def bias(self, w: Tensor) -> Tensor | None:
        """What the shift adds to the bias: ``W shift``, ``[N]``, of the original ``w [N, K]``."""
        return None if self.shift is None else w @ self.shift.to(w)

    def _arrange(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        side = None
        if self.outliers is not None:
            side = x[..., self.outliers]
            x = x.index_fill(-1, self.outliers.to(x.device), 0)
        if self.permutation is not None:
            x = x[..., self.permutation]
        return (x if self.rotation is None else self.rotation.apply(x)), side

    def without(self, *names: str) -> Transform:
        """A copy with the named fields dropped."""
        return replace(self, **dict.fromkeys(names))


def groups_fault(groups: object, channels: int) -> str | None:
    """What is wrong with ``groups`` as sizes of clusters of ``channels``, if anything."""
    if not isinstance(groups, tuple) or not all(type(size) is int and size > 0 for size in groups):
        return f"groups is {groups!r}, not a tuple of positive sizes"
    if sum(groups) != channels:
        return f"groups {groups} sum to {sum(groups)}, not to the {channels} channels"
    return None


def _merge(first, second, combine):  # type: ignore[no-untyped-def]  # None is the identity
    if first is None or second is None:
        return second if first is None else first
    return combine(first, second)
