"""What a calibrator may decide about the channels of a site, as data that preserves the function.

A linear computes ``y = x W^T + b``. A :class:`Transform` rewrites both sides so that ``y`` stays the same::

    x' = R P ((x - shift) / scale)         W' = R P (W * scale)         b' = b + W shift

with a permutation ``P`` and a block-diagonal orthogonal rotation ``R``, and takes the ``outliers`` channels out of ``x'`` and
``W'`` into a small side product in the model's own dtype. Calibrators return transforms, :mod:`quantkit.pipeline.fold` puts
what it can into the producer of the site, and :class:`quantkit.W8A8Linear` runs what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.core.errors import MethodError
from quantkit.core.rewrite import rewritten
from quantkit.core.rotation import Rotation

T = TypeVar("T")


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
        shift = None if self.shift is None else self.shift.to(x)
        return self._both(x, shift, torch.div)

    def weight(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """The INT8 side ``W' [N, K]`` and the side ``[N, n]`` or None, of ``w [N, K]``."""
        return self._both(w, None, torch.mul)

    def bias(self, w: Tensor) -> Tensor | None:
        """What the shift adds to the bias: ``W shift``, ``[N]``, of the original ``w [N, K]``."""
        return None if self.shift is None else w @ self.shift.to(w)

    def _both(
        self, x: Tensor, shift: Tensor | None, scaled: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The steps of :func:`quantkit.core.rewrite.rewritten`; what is taken aside is scaled as well."""
        scale = None if self.scale is None else self.scale.to(x)
        outliers = None if self.outliers is None else self.outliers.to(x.device)
        inner, aside = rewritten(
            x,
            shift=shift,
            outliers=outliers,
            scaled=None if scale is None else lambda value: scaled(value, scale),
            permutation=self.permutation,
            rotated=None if self.rotation is None else self.rotation.apply,
        )
        if aside is not None and scale is not None:
            aside = scaled(aside, scale[outliers])
        return inner, aside

    def without(self, *names: str) -> Transform:
        """A copy with the named fields dropped."""
        return replace(self, **dict.fromkeys(names))


def _merge(first: T | None, second: T | None, combine: Callable[[T, T], T]) -> T | None:
    """Both of them combined, where None is the identity."""
    if first is None or second is None:
        return second if first is None else first
    return combine(first, second)
