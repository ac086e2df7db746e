"""Rotation at run time: channels of a linear's input are mixed, so that no single one is much larger than the others.

QuaRot (Ashkboos et al. 2024, section 4) does this to the inputs of down projections for 4 bits; here any linear may have it.
The rotation of activations is part of the pass that quantizes them, so that it costs little. See
:mod:`quantkit.calibrators.rotate` for rotations that are written into the weights and cost nothing, where a model allows them.
"""

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

SMALLEST_BLOCK = 8
"""Smaller blocks spread an outlier over too few channels to be worth the work."""


@dataclass(frozen=True)
class Hadamard(PerSite):
    """Rotate the input of every linear at run time, in blocks of channels, by Hadamard matrices.

    The activation becomes ``x R`` and the weight ``W R``, with a block-diagonal R of normalized Hadamard matrices. R is
    orthogonal, so that ``(x R) (W R)^T = x W^T``. An outlier of size a in one channel becomes ``block`` values of size ``a /
    sqrt(block)``, and the step between two integers shrinks with the largest value.

    This needs no data, and no module that could take the rotation over: weights are rotated once, and activations whenever they
    are quantized. Channels whose weights are much smaller than those of their neighbours would lose by it. ``[SmoothQuant(),
    Hadamard()]`` evens them out first. Inputs that were rotated in the weights already, by ``Rotate``, are left alone.

    Args:
        block: channels in a block, a power of two from 8 up, or ``"full"`` for the largest power of two that divides the width.
            Where ``block`` does not divide the width of a linear, the largest power of two that does is taken; where 8 does not
            divide it, the linear is left alone. The report says which.
        seed: of random signs that channels are multiplied by ahead of R, drawn anew for every site; None for no signs.

    Raises:
        MethodError: ``block`` or ``seed`` is something else.
    """

    name: ClassVar[str] = "hadamard"
    stage: ClassVar[Stage] = Stage.ROTATE
    statistics: ClassVar[tuple[type[Statistic], ...]] = ()

    block: int | str = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        block = self.block
        power = isinstance(block, int) and not isinstance(block, bool) and block >= SMALLEST_BLOCK and not block & (block - 1)
        if block != "full" and not power:
            raise MethodError(
                f"Hadamard(block={block!r}): a block is a power of two from {SMALLEST_BLOCK} up, such as 64, or 'full'"
            )
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise MethodError(f"Hadamard(seed={self.seed!r}): a seed is an integer, or None for no random signs")

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        rotation = self.foresee(site)
        if rotation is None and site.rotated_space:
            return Transform(), {}  # the report says so already
        if rotation is None:
            return Transform(), {"rotated": "no: nothing is folded" if site.fold_only else f"no: {site.site.channels} channels"}
        return Transform(rotation=rotation), {"block": rotation.block}

    def foresee(self, site: SiteView) -> Rotation | None:
        """The rotation that this site will get, None for none.

        Only the width and the name of the site decide it, so that calibrators that come before may ask.
        """
        k = site.site.channels
        divides = k & -k
        block = divides if isinstance(self.block, str) else min(self.block, divides)
        if site.fold_only or site.rotated_space or block < SMALLEST_BLOCK:
            return None
        signs = None
        if self.seed is not None:
            random = torch.Generator().manual_seed(self.seed + zlib.crc32(site.name.encode()))
            signs = (torch.randint(0, 2, (k,), generator=random, dtype=torch.int64, device="cpu") * 2.0 - 1).to(site.device)
        return Rotation(block, signs)
