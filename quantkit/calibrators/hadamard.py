"""Rotation: mix channels, so that no single one sticks out (QuaRot, Ashkboos et al. 2024, there for 4 bits)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from quantkit.calibration.statistics import Statistic
from quantkit.calibrators.base import PerSite, SiteView, Stage
from quantkit.core.errors import MethodError
from quantkit.core.rotation import Rotation
from quantkit.core.transform import Transform

LEAST = 8
"""Smaller blocks spread an outlier over too few channels to be worth a product."""


@dataclass(frozen=True)
class Hadamard(PerSite):
    """x' = x R and W' = W R, with R block-diagonal of normalised Hadamard matrices: orthogonal, so ``x' W'^T = x W^T``.

    An outlier of size a in one channel becomes ``block`` values of ``a / sqrt(block)``, and the step of INT8 shrinks with the
    largest value. Needs no data and no producer: weights are rotated once, activations while they are quantized. Channels whose
    weights are much smaller than their neighbours' would lose by it; smooth first, ``[SmoothQuant(), Hadamard()]``, which
    evens them out.

    Args:
        block: channels of a block, a power of two from 8 up; ``"full"`` for the largest that divides the width. A width that
            ``block`` does not divide takes the largest power of two that does; a width that 8 does not divide is left alone.
            The report says which.
        seed: of random signs ahead of R, another draw for every site; None for none.

    Raises:
        MethodError: block or seed is something else.
    """

    name: ClassVar[str] = "hadamard"
    stage: ClassVar[Stage] = Stage.ROTATE
    statistics: ClassVar[tuple[type[Statistic], ...]] = ()

    block: int | str = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        block = self.block
        power = isinstance(block, int) and not isinstance(block, bool) and block >= LEAST and not block & (block - 1)
        if block != "full" and not power:
            raise MethodError(f"Hadamard(block={block!r}): a block is a power of two from {LEAST} up, such as 64, or 'full'")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise MethodError(f"Hadamard(seed={self.seed!r}): a seed is an integer, or None for no random signs")

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        rotation = self.foresee(site)
        if rotation is None and site.turned:
            return Transform(), {}  # the report says so already
        if rotation is None:
            return Transform(), {"rotated": "no: nothing is folded" if site.fold_only else f"no: {site.site.channels} channels"}
        return Transform(rotation=rotation), {"block": rotation.block}

    def foresee(self, site: SiteView) -> Rotation | None:
        """What it will do to this site, for calibrators that come before: the width and the name decide it."""
        k = site.site.channels
        divides = k & -k
        block = divides if isinstance(self.block, str) else min(self.block, divides)
        if site.fold_only or site.turned or block < LEAST:
            return None
        signs = None
        if self.seed is not None:
            random = torch.Generator().manual_seed(self.seed + zlib.crc32(site.name.encode()))
            signs = (torch.randint(0, 2, (k,), generator=random) * 2.0 - 1).to(site.device)
        return Rotation(block, signs)
