"""SmoothQuant (Xiao et al. 2023): move the difficulty of activations into weights, where it costs less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.calibration.statistics import Range, Statistic, TokenSample
from quantkit.calibrators.base import PerSite, SiteView, Stage
from quantkit.calibrators.noise import noise, power_mean, sampled_rows
from quantkit.core.errors import MethodError
from quantkit.core.transform import Transform

ALPHAS = tuple(i / 20 for i in range(21))
NORMS = (2, 4, 8, None)
"""Powers of the mean by which a channel's size is measured; None is the paper's maximum."""

DEAD = 1e-6
"""A channel whose maximum is below this share of the median never fired in calibration."""


@dataclass(frozen=True)
class SmoothQuant(PerSite):
    """x' = x / s and W' = W s, with ``s = a**alpha / w**(1 - alpha)`` for each channel (paper, eq. 4).

    ``a`` is the channel's largest absolute activation over the calibration data and ``w`` its largest absolute weight over
    all linears of the site. With a fixed ``alpha`` that is the whole of it. With ``"auto"`` each site chooses, in closed
    form and without another forward pass, the alpha and the measure of ``a`` (maximum, or a power mean that one rare token
    cannot decide) with the least predicted output error, see :func:`noise`. In ``[SmoothQuant(), Hadamard()]`` it is the error
    behind the rotation.

    Channels that never fired keep s = 1 (the paper's formula would multiply the producer's row by up to 1e5). Channels that
    no weight reads only pollute the token's maximum and are shrunk to the median.

    Args:
        alpha: 0 (all difficulty stays in activations) to 1 (all moves to weights), or ``"auto"``.

    Raises:
        MethodError: alpha is neither.
    """

    name: ClassVar[str] = "smoothquant"
    stage: ClassVar[Stage] = Stage.SCALE
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Range, TokenSample)

    alpha: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if self.alpha != "auto" and not (number and 0 <= float(self.alpha) <= 1):
            raise MethodError(f"SmoothQuant(alpha={self.alpha!r}): alpha is a number from 0 to 1, or 'auto'")

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        if site.fold_only and site.site.producer is None:
            return Transform(), {}
        weight = torch.cat([w for _, w in site.weights()])
        a = site.site.tie(site.statistic(Range).absmax)
        w = site.site.tie(weight.abs().amax(0))
        if self.alpha != "auto":
            return Transform(scale=smooth_scale(a, w, self.alpha)), {"alpha": self.alpha}
        tokens, counts = site.statistic(TokenSample).weighted()
        rows = sampled_rows(weight)
        best = (float("inf"), torch.ones_like(a), "none", 0.0)
        for power in NORMS:
            size = a if power is None else site.site.tie(power_mean(tokens, counts, power))
            for alpha in ALPHAS:
                scale = smooth_scale(size, w, alpha)
                error = noise(tokens / scale, counts, rows * scale, site.scheme, site.rotation_ahead)
                if error < best[0]:
                    best = (error, scale, "max" if power is None else f"L{power}", alpha)
        return Transform(scale=best[1]), {"alpha": best[3], "norm": best[2]}


def smooth_scale(a: Tensor, w: Tensor, alpha: float) -> Tensor:
    """``a**alpha / w**(1 - alpha)`` for ``a [K]`` and ``w [K]`` in float32, 1 for dead channels, see :class:`SmoothQuant`."""
    a, w = a.float(), w.float()
    median = a.median()
    dead, unread = a <= DEAD * median, w == 0
    scale = a**alpha / w ** (1 - alpha)
    scale = torch.where(unread, (a / median).clamp_min(1.0), scale)
    return torch.where(dead | ~torch.isfinite(scale) | (scale <= 0), 1.0, scale)
