"""RPTQ (Yuan et al. 2023): channels of similar range go together, and each cluster gets scales of its own."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.calibration.statistics import Range, Statistic, TokenSample
from quantkit.calibrators.base import PerSite, SiteView, Stage
from quantkit.core.errors import MethodError
from quantkit.core.transform import Transform

STARTS, STEPS = 10, 100
"""K-means starts so many times, and takes at most so many steps."""

LEAST_TILES = 2
"""Tiles get smaller until there are so many for each cluster."""

WORTH_PADDING = 1.25
"""A first cluster that is no whole tile has to be padded: it is taken where whole tiles were noisier by this factor, 1 dB."""


@dataclass(frozen=True)
class RPTQ(PerSite):
    """Put the channels of each site in clusters by their maximum and minimum over the calibration data.

    Each cluster has a scale (and zero point) of its own, static or per token as the scheme says, and weights have one for each
    row and cluster. Channels are reordered, so that a cluster is one run of them: in the rows of the linears that write them
    where that is proven to be free, else while the activation is quantized. The report says which.

    ``"kmeans"`` is the paper's way. Its clusters have any size, and a matrix product that works on tiles pays for that in
    padding. ``"tiles"`` sorts channels by range and cuts, by dynamic programming, between tiles only, but for a first cluster
    of outliers, smaller than a tile, where that saves a decibel of noise.

    Where a later calibrator rotates blocks of channels, whole blocks change places, and it is their ranges behind the rotation
    that count.

    Args:
        clusters: at most so many for each site; never more than it has distinct channels.
        by: ``"tiles"`` or ``"kmeans"``.
        tile: channels of a tile, for ``"tiles"``. Sites with fewer than two of them for each cluster are cut into smaller ones.
        seed: of K-means.
        head_clusters: at most so many for the keys (and queries) of each head and as many for its values, where the scheme
            quantizes attention; 1 for none. Nothing is reordered there.

    Raises:
        MethodError: a value is something else.
    """

    name: ClassVar[str] = "rptq"
    stage: ClassVar[Stage] = Stage.PARTITION
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Range, TokenSample)

    clusters: int = 8
    by: Literal["tiles", "kmeans"] = "tiles"
    tile: int = 128
    seed: int = 0
    head_clusters: int = 4

    def __post_init__(self) -> None:
        for what, least in (("clusters", 1), ("tile", 1), ("seed", 0), ("head_clusters", 1)):
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise MethodError(f"RPTQ({what}={value!r}): {what} is a whole number from {least} up")
        if self.by not in ("tiles", "kmeans"):
            raise MethodError(f"RPTQ(by={self.by!r}): use 'tiles' or 'kmeans'")

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        if site.fold_only:
            return Transform(), {"clusters": "no: nothing is rounded"}
        carriers, k = site.site.carriers, site.site.channels
        low, high, weight, unit = _channels(site)
        symmetric = site.scheme.symmetric and site.scheme.quantizes_activations  # else both ends tell channels apart
        runs = 1
        if unit == 1 and carriers is not None and carriers.span < k and self.clusters >= 2 * (k // carriers.span):
            # Each head can have clusters of its own, and then no channel leaves its head: its rows can be reordered.
            runs = k // carriers.span
            low, high, weight = -site.site.tie(-low), site.site.tie(high), site.site.tie(weight)
        order, groups = [], []
        for first in range(0, len(low), len(low) // runs):
            part = slice(first, first + len(low) // runs)
            ranges = low[part].cpu(), high[part].cpu(), weight[part].cpu()
            mine, sizes = self._clusters(*ranges, self.clusters // runs, symmetric, site.name, unit)
            order.append(mine + first)
            groups += [size * unit for size in sizes]
        permutation = (torch.cat(order)[:, None] * unit + torch.arange(unit)).flatten()
        if len(groups) == 1:
            return Transform(), {"clusters": 1}
        natural = torch.equal(permutation, torch.arange(k))
        return (
            Transform(permutation=None if natural else permutation.to(site.device), groups=tuple(groups)),
            {"clusters": len(groups)},
        )

    def label_head(self, low: Tensor, high: Tensor, symmetric: bool, name: str) -> Tensor:
        low, high = low.clamp_max(0).cpu(), high.clamp_min(0).cpu()
        if self.by == "tiles":  # channels are sorted by one range
            low, high = low.amin(0), high.amax(0)
        order, sizes = self._clusters(low, high, torch.ones(low.shape[-1]), self.head_clusters, symmetric, name)
        label = torch.empty_like(order)
        label[order] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return label

    def _clusters(
        self, low: Tensor, high: Tensor, weight: Tensor, count: int, symmetric: bool, name: str, unit: int = 1
    ) -> tuple[Tensor, list[int]]:
        """Order of channels ``[..., K]`` or of units of them, widest cluster first, and sizes of at most ``count`` clusters."""
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        points, live = points_of(low, high)
        count = min(count, len(points[live].unique(dim=0)))
        if count <= 1:
            return torch.arange(len(points)), [len(points)]
        if self.by == "kmeans":
            random = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            return by_kmeans(low, high, count, random)
        return by_tiles(low, high, weight, count, max(1, self.tile // unit))


def _channels(site: SiteView) -> tuple[Tensor, Tensor, Tensor, int]:
    """What is to be put in clusters: least and largest value ``[n]``, how much an error in it counts ``[n]``, and of how many
    channels beside each other these are: of one, or of a block that a later calibrator rotates."""
    rotation = site.rotation_ahead
    unit = 1 if rotation is None else rotation.block
    if rotation is None:
        seen = site.statistic(Range)
        low, high = seen.low, seen.high
    else:
        low, high = torch.aminmax(rotation.apply(site.statistic(TokenSample).weighted()[0]), dim=0)
    # an error in channel j reaches the outputs through column j
    weight = torch.zeros_like(low)
    for _, w in site.weights():
        weight += (w if rotation is None else rotation.apply(w)).square().sum(0)
    low, high = low.clamp_max(0), high.clamp_min(0)  # 0 has a code in any case
    return low.view(-1, unit).amin(1), high.view(-1, unit).amax(1), weight.view(-1, unit).sum(1), unit


def points_of(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Points ``[K, 2]`` of channels with ranges ``[K]``, or ``[K, 2 P]`` of P ranges each ``[P, K]``, and which ever fired."""
    low, high = torch.atleast_2d(low, high)
    return torch.cat([low, high]).t(), (high > low).any(0)


def by_kmeans(low: Tensor, high: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, list[int]]:
    """Order ``[K]`` and sizes of at most ``count`` clusters of the points ``(low, high)``; dead ones join the narrowest."""
    points, live = points_of(low, high)
    points = points[live].double()
    best = (float("inf"), torch.zeros(len(points), dtype=torch.long))
    for _ in range(STARTS):
        best = min(best, _kmeans(points, count, random), key=lambda found: found[0])
    label = torch.zeros(len(live), dtype=torch.long)
    label[live] = best[1]
    used = best[1].unique()
    width = torch.stack([(high - low)[..., live & (label == c)].max() for c in used])
    rank = torch.full((count,), len(used) - 1)
    rank[used[width.argsort(descending=True, stable=True)]] = torch.arange(len(used))
    label = torch.where(live, rank[label], len(used) - 1)
    return label.argsort(stable=True), torch.bincount(label, minlength=len(used)).tolist()


def _kmeans(points: Tensor, count: int, random: torch.Generator) -> tuple[float, Tensor]:
    """Sum of squared distances and label ``[n]`` of ``points [n, p]``, from centres drawn far from each other."""
    centers = points[torch.randint(len(points), (1,), generator=random)]
    while len(centers) < count:
        far = torch.cdist(points, centers).amin(1).square()
        if not bool(far.sum() > 0):
            break
        centers = torch.cat([centers, points[torch.multinomial(far / far.sum(), 1, generator=random)]])
    label = torch.cdist(points, centers).argmin(1)
    for _ in range(STEPS):
        size = torch.bincount(label, minlength=len(centers))[:, None]
        mean = torch.zeros_like(centers).index_add(0, label, points) / size.clamp_min(1)
        centers = torch.where(size > 0, mean, centers)
        before, label = label, torch.cdist(points, centers).argmin(1)
        if torch.equal(before, label):
            break
    return float((points - centers[label]).square().sum()), label


def by_tiles(low: Tensor, high: Tensor, weight: Tensor, count: int, tile: int) -> tuple[Tensor, list[int]]:
    """Order ``[K]`` and sizes of at most ``count`` clusters, all but the first and the last a multiple of ``tile`` channels.

    The noise of a cluster is the square of its range times the sum of ``weight [K]``, how much each channel's error counts. The
    first cluster may have any size up to a tile, where that is :data:`WORTH_PADDING`; where the rest is cut, between tiles, is
    found by dynamic programming.
    """
    k = len(low)
    while tile > 1 and tile * count * LEAST_TILES > k:
        tile //= 2
    order = (high - low).argsort(descending=True, stable=True)
    low, high, weight = low[order].double(), high[order].double(), weight[order].double()
    whole, sizes = _cut(low, high, weight, count, tile)
    best = (whole / WORTH_PADDING, sizes)
    for first in range(1, min(tile, k)):
        head = float(weight[:first].sum() * (high[:first].max() - low[:first].min()) ** 2)
        if head < best[0]:
            noise, sizes = _cut(low[first:], high[first:], weight[first:], count - 1, tile)
            best = min(best, (head + noise, [first, *sizes]), key=lambda found: found[0])
    sizes = best[1]
    while len(sizes) > 1 and not bool((high > low)[k - sizes[-1] :].any()):  # dead channels alone would have no range
        sizes = [*sizes[:-2], sizes[-2] + sizes[-1]]
    return order, sizes


def _cut(low: Tensor, high: Tensor, weight: Tensor, count: int, tile: int) -> tuple[float, list[int]]:
    """Least noise of at most ``count`` clusters of whole tiles of sorted channels, and their sizes."""
    starts = torch.arange(0, len(low), tile)
    ends = (starts + tile).clamp_max(len(low))
    n = len(starts)
    tops = torch.stack([part.max() for part in high.split(tile)]).expand(n, n)
    bottoms = torch.stack([part.min() for part in low.split(tile)]).expand(n, n)
    later = torch.ones(n, n, dtype=torch.bool).triu()
    top, bottom = tops.where(later, 0.0).cummax(1).values, bottoms.where(later, 0.0).cummin(1).values
    # [i, j]: of tiles i to j in one cluster
    total = torch.cat([weight.new_zeros(1), weight.cumsum(0)])
    noise = ((total[ends][None, :] - total[starts][:, None]) * (top - bottom) ** 2).where(later, float("inf"))
    least, origins = noise[0], []
    for _ in range(min(count, n) - 1):
        # one cluster more: up to tile i - 1 as before, and then i to j
        longer = torch.cat([torch.full((1, n), float("inf"), dtype=noise.dtype), least[:-1, None] + noise[1:]])
        value, origin = longer.min(0)
        better = value < least
        origins.append(torch.where(better, origin, -1))
        least = torch.where(better, value, least)
    sizes: list[int] = []
    last = n - 1
    for origin in reversed(origins):
        i = int(origin[last])
        if i > 0:
            sizes.insert(0, int(ends[last] - starts[i]))
            last = i - 1
    return float(least[-1]), [int(ends[last]), *sizes]
