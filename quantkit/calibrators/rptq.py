"""RPTQ (Yuan et al. 2023): channels of similar range go together, and share a scale that suits them.

Channels of one activation have very different ranges, and a single scale leaves the small ones with few codes. RPTQ puts
channels of similar range into *clusters*. Then it reorders the channels so that each cluster is a run of consecutive ones, a
*group*, since a product can change its scale from one run to the next, but not from channel to channel. So this file decides
two things for each
site: a permutation of its channels, and the sizes of the groups.

There are two ways to make clusters. :func:`by_kmeans` is the paper's. :func:`by_tiles` knows that kernels work on tiles of,
say, 128 channels, and makes groups whose sizes are whole tiles, because any other group has to be padded.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from quantkit.calibration.statistics import Range, Statistic, TokenSample
from quantkit.calibrators.base import PerSite, SiteView, Stage
from quantkit.core.errors import MethodError
from quantkit.core.formats import Quantized
from quantkit.core.transform import Transform

STARTS, STEPS = 10, 100
"""How many times K-means is started, and how many steps it takes each time at most."""

LEAST_TILES = 2
"""Tiles are halved until there are so many for each cluster: with fewer there is little to choose."""

WORTH_PADDING = 1.25
"""A first group that is not a whole tile has to be padded. It is taken if whole tiles would be noisier by this factor, 1 dB."""


@dataclass(frozen=True)
class RPTQ(PerSite):
    """Puts the channels of each site into clusters, by their least and largest value over the calibration data.

    Channels are then reordered so that each cluster becomes a group of consecutive channels. A group has a scale (and a zero
    point) of its own, fixed or for each token as the scheme says, and each row of a weight has a scale for each group. The
    order costs nothing where it can be brought about by reordering the rows of the linears that produce the channels, which
    discovery has to prove; elsewhere channels are reordered while the activation is quantized. The report says which.

    ``"kmeans"`` is the way of the paper. Its clusters have any size, and a product that works on tiles has to pad each of them.
    ``"tiles"`` sorts channels by range and divides the sorted row between whole tiles, at the places that make the predicted
    noise least (by dynamic programming). Only its first group, of outliers, may be smaller than a tile, if that saves a decibel
    of noise.

    Where a later calibrator rotates blocks of channels, whole blocks change places, and the ranges behind the rotation decide.

    Args:
        clusters: the largest number of clusters for each site. There are never more than distinct channels.
        by: ``"tiles"`` or ``"kmeans"``.
        tile: the channels of a tile, for ``"tiles"``. Sites with fewer than two tiles for each cluster have smaller ones.
        seed: of K-means.
        head_clusters: the largest number of clusters for the keys (and queries) of each head, and for its values, where the
            scheme quantizes attention; 1 leaves each head whole. Nothing is reordered there.

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
        low, high, weight, block = _channels(site)
        # Without symmetric codes both ends of a range matter, so both tell channels apart.
        input_ = site.scheme.input
        symmetric = isinstance(input_, Quantized) and input_.number.symmetric
        spans = 1
        if block == 1 and carriers is not None and carriers.span < k and self.clusters >= 2 * (k // carriers.span):
            # The rows that produce these channels may be reordered within spans (the heads of attention) only. There are enough
            # clusters to give each span some of its own, so that the order can be had for nothing.
            spans = k // carriers.span
            low, high, weight = -site.site.tie(-low), site.site.tie(high), site.site.tie(weight)
        order, groups = [], []
        for first in range(0, len(low), len(low) // spans):
            part = slice(first, first + len(low) // spans)
            ranges = low[part].cpu(), high[part].cpu(), weight[part].cpu()
            own, sizes = self._clusters(*ranges, self.clusters // spans, symmetric, site.name, block)
            order.append(own + first)
            groups += [size * block for size in sizes]
        permutation = (torch.cat(order)[:, None] * block + torch.arange(block, dtype=torch.int64, device="cpu")).flatten()
        if len(groups) == 1:
            return Transform(), {"clusters": 1}
        natural = torch.equal(permutation, torch.arange(k, dtype=torch.int64, device="cpu"))
        return (
            Transform(permutation=None if natural else permutation.to(site.device), groups=tuple(groups)),
            {"clusters": len(groups)},
        )

    def label_head(self, low: Tensor, high: Tensor, symmetric: bool, name: str) -> Tensor:
        low, high = low.clamp_max(0).cpu(), high.clamp_min(0).cpu()
        if self.by == "tiles":  # which sorts channels by a single range
            low, high = low.amin(0), high.amax(0)
        order, sizes = self._clusters(
            low, high, torch.ones(low.shape[-1], dtype=torch.float32, device="cpu"), self.head_clusters, symmetric, name
        )
        label = torch.empty_like(order)
        label[order] = torch.arange(len(sizes), dtype=torch.int64, device="cpu").repeat_interleave(
            torch.tensor(sizes, dtype=torch.int64, device="cpu")
        )
        return label

    def _clusters(
        self, low: Tensor, high: Tensor, weight: Tensor, count: int, symmetric: bool, name: str, block: int = 1
    ) -> tuple[Tensor, list[int]]:
        """Put channels, or blocks of channels, into at most ``count`` clusters.

        Args:
            low, high: ``[n]``, or ``[P, n]`` for P ranges of each: the least and the largest value.
            weight: ``[n]``, how much an error in each counts.
            count: the largest number of clusters.
            symmetric: whether codes are symmetric, so that only the larger end of a range matters.
            name: mixed into the seed of K-means.
            block: how many channels each of the n stands for.

        Returns:
            Their order ``[n]``, with the cluster of the widest range first, and the sizes of the clusters.
        """
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        points, live = points_of(low, high)
        count = min(count, len(points[live].unique(dim=0)))
        if count <= 1:
            return torch.arange(len(points), dtype=torch.int64, device="cpu"), [len(points)]
        if self.by == "kmeans":
            random = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            return by_kmeans(low, high, count, random)
        return by_tiles(low, high, weight, count, max(1, self.tile // block))


def _channels(site: SiteView) -> tuple[Tensor, Tensor, Tensor, int]:
    """What is to be put into clusters: single channels, or blocks of them if a later calibrator rotates blocks.

    Returns:
        The least and the largest value of each (``[n]`` both, with 0 between them), how much an error in it counts (``[n]``),
        and the number of channels in each.
    """
    rotation = site.rotation_ahead
    block = 1 if rotation is None else rotation.block
    if rotation is None:
        seen = site.statistic(Range)
        low, high = seen.low, seen.high
    else:
        low, high = torch.aminmax(rotation.apply(site.statistic(TokenSample).weighted()[0]), dim=0)
    # An error in channel j reaches the outputs through column j of the weights.
    weight = torch.zeros_like(low)
    for _, w in site.weights():
        weight += (w if rotation is None else rotation.apply(w)).square().sum(0)
    low, high = low.clamp_max(0), high.clamp_min(0)  # every grid has a code for 0
    return low.view(-1, block).amin(1), high.view(-1, block).amax(1), weight.view(-1, block).sum(1), block


def points_of(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Channels as points, whose coordinates are the ends of their ranges.

    Args:
        low, high: ``[K]``, or ``[P, K]`` for channels with P ranges each.

    Returns:
        ``[K, 2 P]``, the points; and ``[K]`` bool, false for channels that were always 0.
    """
    low, high = torch.atleast_2d(low, high)
    return torch.cat([low, high]).t(), (high > low).any(0)


def by_kmeans(low: Tensor, high: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, list[int]]:
    """Clusters of channels whose ranges are near each other, found by K-means.

    Channels that were always 0 join the cluster with the narrowest range.

    Args:
        low, high: ``[K]`` or ``[P, K]``, the ends of their ranges.
        count: the largest number of clusters.
        random: draws where K-means starts.

    Returns:
        The order of channels ``[K]``, with the widest cluster first, and the sizes of the clusters.
    """
    points, live = points_of(low, high)
    points = points[live].double()
    best = (float("inf"), torch.zeros(len(points), dtype=torch.long, device="cpu"))
    for _ in range(STARTS):
        best = min(best, _kmeans(points, count, random), key=lambda found: found[0])
    label = torch.zeros(len(live), dtype=torch.long, device="cpu")
    label[live] = best[1]
    used = best[1].unique()
    width = torch.stack([(high - low)[..., live & (label == c)].max() for c in used])
    rank = torch.full((count,), len(used) - 1, dtype=torch.int64, device="cpu")
    rank[used[width.argsort(descending=True, stable=True)]] = torch.arange(len(used), dtype=torch.int64, device="cpu")
    label = torch.where(live, rank[label], len(used) - 1)
    return label.argsort(stable=True), torch.bincount(label, minlength=len(used)).tolist()


def _kmeans(points: Tensor, count: int, random: torch.Generator) -> tuple[float, Tensor]:
    """One run of K-means on ``points [n, p]``, from centres that are drawn far from each other (K-means++).

    Returns:
        The sum of squared distances of points from their centres, and the cluster of each point, ``[n]`` int64.
    """
    centers = points[torch.randint(len(points), (1,), generator=random, dtype=torch.int64, device="cpu")]
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
    """Groups of whole tiles of channels that are sorted by their range.

    The predicted noise of a group is the square of its range times the sum of the weights of its channels. The sizes are those
    with the least sum of noise: all whole tiles, except that the first group may have any size up to a tile if that is
    :data:`WORTH_PADDING`, and that the last one ends with the channels.

    Args:
        low, high: ``[K]``, the ends of the ranges of channels.
        weight: ``[K]``, how much an error in each channel counts.
        count: the largest number of groups.
        tile: channels of a tile; halved until there are :data:`LEAST_TILES` tiles for each group.

    Returns:
        The order of channels ``[K]``, from the widest range to the narrowest, and the sizes of the groups.
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
    while len(sizes) > 1 and not bool((high > low)[k - sizes[-1] :].any()):  # a group of zeros alone would have no range
        sizes = [*sizes[:-2], sizes[-2] + sizes[-1]]
    return order, sizes


def _cut(low: Tensor, high: Tensor, weight: Tensor, count: int, tile: int) -> tuple[float, list[int]]:
    """Where to divide sorted channels between whole tiles, by dynamic programming.

    Arguments are those of :func:`by_tiles`, sorted. Returns the least noise of at most ``count`` groups, and their sizes.
    """
    starts = torch.arange(0, len(low), tile, dtype=torch.int64, device="cpu")
    ends = (starts + tile).clamp_max(len(low))
    n = len(starts)
    tops = torch.stack([part.max() for part in high.split(tile)]).expand(n, n)
    bottoms = torch.stack([part.min() for part in low.split(tile)]).expand(n, n)
    later = torch.ones(n, n, dtype=torch.bool, device="cpu").triu()
    top, bottom = tops.where(later, 0.0).cummax(1).values, bottoms.where(later, 0.0).cummin(1).values
    # noise[i, j] is that of one group of tiles i to j.
    total = torch.cat([weight.new_zeros(1), weight.cumsum(0)])
    noise = ((total[ends][None, :] - total[starts][:, None]) * (top - bottom) ** 2).where(later, float("inf"))
    least, origins = noise[0], []
    for _ in range(min(count, n) - 1):
        # With one group more: tiles up to i - 1 as before, and then tiles i to j in the new group.
        longer = torch.cat([torch.full((1, n), float("inf"), dtype=noise.dtype, device="cpu"), least[:-1, None] + noise[1:]])
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
