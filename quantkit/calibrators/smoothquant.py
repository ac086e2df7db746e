"""SmoothQuant (Xiao et al. 2023): divide large channels of activations by a scale, and multiply the weights by it.

The product stays the same, ``(x / s) (W s)^T = x W^T``, but channels that stood out in x no longer do, and one scale for each
token suits them all. The weights get worse by as much, which they can afford, having a scale for each row. The divisions cost
nothing at run time where they are folded into the layer before.
"""

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
"""What ``alpha="auto"`` tries."""
NORMS = (2, 4, 8, None)
"""How the size of a channel is measured: by the power mean of this power, or, for None, by its maximum as in the paper."""

DEAD = 1e-6
"""A channel whose maximum is at most this fraction of the median counts as one that was always 0 in calibration."""


@dataclass(frozen=True)
class SmoothQuant(PerSite):
    """Divides each channel of an activation by ``s = a**alpha / w**(1 - alpha)`` and multiplies the weights by it (paper, eq.
    4).

    ``a`` is the channel's largest absolute activation over the calibration data, and ``w`` its largest absolute weight over all
    linears of the site. With ``"auto"`` each site chooses its own alpha, and whether ``a`` is the maximum or a power mean,
    which a single rare token cannot decide: whatever makes the predicted error of the output least
    (:func:`quantkit.calibrators.noise.noise`). In ``[SmoothQuant(), Hadamard()]`` that is the error behind the rotation.

    There are two exceptions to the formula. Channels that were always 0 in calibration keep s = 1; the formula would multiply
    the row that produces them by up to 1e5. Channels that no weight reads are scaled down to the median, since they can only
    make the largest value of a token larger.

    Args:
        alpha: from 0 (activations stay as they are) to 1 (all channels of an activation become equally large), or ``"auto"``.

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
    """``a**alpha / w**(1 - alpha)`` for ``a [K]`` and ``w [K]``, with the exceptions of :class:`SmoothQuant`: ``[K]``
    float32."""
    a, w = a.float(), w.float()
    median = a.median()
    dead, unread = a <= DEAD * median, w == 0
    scale = a**alpha / w ** (1 - alpha)
    scale = torch.where(unread, (a / median).clamp_min(1.0), scale)
    return torch.where(dead | ~torch.isfinite(scale) | (scale <= 0), 1.0, scale)
