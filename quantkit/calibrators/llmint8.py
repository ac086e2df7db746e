"""LLM.int8() (Dettmers et al. 2022): a few columns stay in 16 bits, so that the rest has no outliers.

In large language models a few channels of an activation are many times larger than all others, and a token's scale has to reach
them. Taken out of the integer product, together with the columns of the weight that read them, they are multiplied in floating
point, and the scale of everything else can be small.
"""

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
"""How many columns ``"auto"`` may keep. Matrix instructions in 16 bits take 16 columns at a time."""

WORTH = 0.9
"""A larger number of columns is taken only if it brings the predicted error below this fraction of that of a smaller number.

That is in addition to the fraction of channels that is left: every channel that is not rounded takes its own error away,
whether it is an outlier or not, and behind a rotation it makes the steps of all others smaller as well.
"""


@dataclass(frozen=True)
class LLMInt8(PerSite):
    """Keeps outlier channels of activations, and the columns of weights that read them, out of the integer product.

    The paper looks in every batch for elements with ``|x| >= 6``, so that the result of a token depends on the other tokens of
    its batch. Here the columns of a site are chosen once, in calibration: those whose removal leaves the least predicted error
    of the output (:func:`quantkit.calibrators.noise.noise`; where a rotation follows, the error behind it). Their weights stay
    in the dtype of the model, and the scales of both sides are computed without them.

    With a ``threshold`` it is the paper's own method, and needs no data: in every batch, the columns of x in which an element
    reaches the threshold are multiplied without rounding x, but with the INT8 codes of the weight, as bitsandbytes does.

    Args:
        columns: how many columns each site keeps. ``"auto"`` chooses 0, 16, 32 or 64, as many as are worth it.
        threshold: the paper uses 6.0. None chooses columns in calibration.

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
        """A sample of tokens, from which the columns are chosen; nothing with a threshold, which needs no data."""
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
    """The best set of ``n`` channels to keep, among those that one of the :func:`rankings` puts first.

    Args:
        tokens, counts: ``[T, K]`` and ``[T]``, sampled tokens and how many each stands for.
        rows: ``[N, K]``, sampled rows of the weights.
        site: for its scheme and the rotation that follows.
        n: how many channels.

    Returns:
        The predicted error without them, and the channels, ``[n]`` int64.
    """
    best, ahead = (float("inf"), tokens.new_empty(0, dtype=torch.long)), site.rotation_ahead
    for size in rankings(tokens, counts):
        chosen = size.topk(n).indices
        error = noise(tokens.index_fill(1, chosen, 0), counts, rows.index_fill(1, chosen, 0), site.scheme, ahead)
        if error < best[0]:
            best = (error, chosen)
    return best


def rankings(tokens: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """Several measures, each ``[K]``, of how much a channel is an outlier.

    The first ones measure how large it is over all tokens; the others how large it is in comparison with the largest channel of
    the same token, which is the one that decides the token's scale.
    """
    for power in (2, 4, 8, None):
        yield tokens.abs().amax(0) if power is None else power_mean(tokens, counts, power)
    relative = tokens.abs() / tokens.abs().amax(1, keepdim=True).clamp_min(1e-30)
    for power in (2, 4, 8):
        yield power_mean(relative, counts, power)
