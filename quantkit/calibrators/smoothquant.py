"""SmoothQuant (Xiao et al. 2023): move the difficulty of activations into weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.calibrators.base import PerSite, SiteView, Stage
from quantkit.errors import MethodError
from quantkit.numerics import qmax
from quantkit.statistics import Range, Statistic, TokenSample
from quantkit.transform import Transform

ALPHAS = tuple(i / 20 for i in range(0, 21))


@dataclass(frozen=True)
class SmoothQuant(PerSite):
    name: ClassVar[str] = "smoothquant"
    stage: ClassVar[Stage] = Stage.SCALE
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Range, TokenSample)

    alpha: float | Literal["auto"] = "auto"

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        if site.fold_only and site.site.producer is None:
            return Transform(), {}
        a = site.site.tie(site.statistic(Range).absmax)
        w = torch.stack([weight.abs().amax(0) for _, weight in site.weights()]).amax(0)
        w = site.site.tie(w)
        if self.alpha != "auto":
            return Transform(scale=smooth_scale(a, w, self.alpha)), {"alpha": self.alpha}
        raise MethodError("soon")


def smooth_scale(a: Tensor, w: Tensor, alpha: float) -> Tensor:
    s = a**alpha / w ** (1 - alpha)
    typical = a.median()
    s = torch.where(w == 0, (a / typical).clamp_min(1), s)
    return torch.where(a <= 1e-6 * typical, 1.0, s)
