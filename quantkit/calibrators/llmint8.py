"""LLM.int8() (Dettmers et al. 2022): a few columns stay in 16 bit, and the rest loses its outliers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.calibration.statistics import Statistic, TokenSample
from quantkit.calibrators.base import PerSite, SiteView, Stage
from quantkit.calibrators.noise import noise, power_mean, sampled_rows
from quantkit.core.errors import MethodError
from quantkit.core.transform import Transform

COUNTS = (16, 32, 64)
"""Columns that ``"auto"`` may keep: whole steps of a 16-bit matrix instruction."""

WORTH = 0.9
"""More columns have to bring the predicted error below this share of what fewer leave, over and above the share of channels
that they are: any channel that is not rounded takes its error away, and behind a rotation its part of the step as well."""


@dataclass(frozen=True)
class LLMInt8(PerSite):
    """Keep the channels in which activations are outliers, and their weight columns, out of INT8.

    The paper looks for ``|x| >= 6`` in every batch, so a token's result depends on its neighbours. Here the columns are a
    property of the site, found in calibration: the set is the one that leaves the least predicted output error, see
    :func:`quantkit.calibrators.noise.noise` (where a rotation follows, the error behind it). Their weights are kept in the
    model's dtype, and neither side's INT8 scale sees them.

    With a ``threshold`` it is the paper's method all the same, and needs no data: in every batch, columns of x with an element
    that reaches it are multiplied without rounding x, with the INT8 codes of the weight, as bitsandbytes does.

    Args:
        columns: for each site, a number, or ``"auto"``: 0, 16, 32 or 64, as many as are worth it.
        threshold: the paper's is 6.0; None for columns from calibration.

    Raises:
        MethodError: columns or threshold is something else, or both are given.
    """

    name: ClassVar[str] = "llm_int8"
    stage: ClassVar[Stage] = Stage.OUTLIERS

    columns: int | Literal["auto"] = "auto"
    threshold: float | None = None

    def __post_init__(self) -> None:
        columns, threshold = self.columns, self.threshold
        if columns != "auto" and (isinstance(columns, bool) or not isinstance(columns, int) or columns < 0):
            raise MethodError(f"LLMInt8(columns={columns!r}): columns is a number for each site, or 'auto'")
        if threshold is None:
            return
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < float("inf"):
            raise MethodError(
                f"LLMInt8(threshold={threshold!r}): a threshold is positive; method='rtn' is LLM.int8() without outliers"
            )
        if columns != "auto":
            raise MethodError(f"LLMInt8(columns={columns}, threshold={threshold}): a threshold finds its own columns; give one")

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """A threshold needs no data."""
        return () if self.threshold else (TokenSample,)

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        if site.fold_only:
            return Transform(), {}
        if self.threshold:
            return Transform(threshold=float(self.threshold)), {"threshold": self.threshold}
        tokens, counts = site.statistic(TokenSample).weighted()
        rows = sampled_rows(torch.cat([w for _, w in site.weights()]))
        if isinstance(self.columns, int):
            best = best_set(tokens, counts, rows, site, min(self.columns, site.site.channels))
        else:
            best = (noise(tokens, counts, rows, site.scheme, site.rotation_ahead), tokens.new_empty(0, dtype=torch.long))
            for n in COUNTS:
                if 4 * n > site.site.channels:
                    break
                more = best_set(tokens, counts, rows, site, n)
                rest = 1 - (n - len(best[1])) / site.site.channels
                if more[0] < WORTH * best[0] * (rest if site.rotation_ahead is None else rest**2):
                    best = more
        chosen = best[1].sort().values
        return Transform(outliers=chosen if len(chosen) else None), {"columns": len(chosen)}


def best_set(tokens: Tensor, counts: Tensor, rows: Tensor, site: SiteView, n: int) -> tuple[float, Tensor]:
    """Predicted error and channels ``[n]`` of the best set of ``n`` that one of the :func:`rankings` puts first."""
    best, ahead = (float("inf"), tokens.new_empty(0, dtype=torch.long)), site.rotation_ahead
    for size in rankings(tokens, counts):
        chosen = size.topk(n).indices
        error = noise(tokens.index_fill(1, chosen, 0), counts, rows.index_fill(1, chosen, 0), site.scheme, ahead)
        if error < best[0]:
            best = (error, chosen)
    return best


def rankings(tokens: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """How far channels stick out, ``[K]``, in several measures: at all times, or in the tokens that they spoil."""
    for power in (2, 4, 8, None):
        yield tokens.abs().amax(0) if power is None else power_mean(tokens, counts, power)
    share = tokens.abs() / tokens.abs().amax(1, keepdim=True).clamp_min(1e-30)
    for power in (2, 4, 8):
        yield power_mean(share, counts, power)
