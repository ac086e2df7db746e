"""Which rows may be reordered so that the channels of a site arrive in another order, asked of the probe.

A factor can be folded only if the way from the producer to the site is linear. An order needs less. Any element-wise function
passes it on, so that fc1 -> GELU -> fc2 qualifies; a product passes it on if the channels of both factors are reordered, as
those of gate and up; and attention passes it on within a head. The linears whose rows have to be reordered together are the
*carriers* of the site. They are found in three steps.

1. Which linears *feed* a site, that is, have any influence on it before the next linear? The rows of all linears at one place
   of the blocks are shuffled, and the sites whose inputs change are fed by this place. By which block, a few more passes tell:
   each shuffles half of the linears, chosen by one bit of their numbers.
2. Candidates are tried, those of all sites in one pass: the producer alone, and all that feeds the site together. Their rows
   are reordered by one random permutation for each site. The site's input then has to be the old one in the new order, and
   nothing else may change in the model. If something does, the sites are halved until the wrong ones stand alone.
3. If not all channels may change places, those within a run of consecutive channels may, such as the channels of a head.
   Shorter and shorter runs are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.core.sites import Carriers, Site
from quantkit.discovery.distances import distance
from quantkit.discovery.probe import Probe, Trace
from quantkit.model.modules import weight_of

SHORTEST_RUN, MOST_RUNS = 4, 256
"""No head has fewer channels, and no model has more heads, so that shorter and more runs are not tried."""

Trial = tuple[Site, Carriers, Tensor]
"""A site, the carriers that are tried for it, and the permutation ``[K]`` int64 of its channels."""


def with_carriers(
    probe: Probe, reference: Trace, noise: float, peers: Sequence[Sequence[str]], sites: list[Site]
) -> list[Site]:
    """``sites`` with the carriers of those where some were proven, and None for the others.

    Args:
        probe: runs the model.
        reference: a pass of it with nothing changed.
        noise: by how much the model's outputs differ between two such passes.
        peers: names of linears in lists of those at the same place in every block.
        sites: sites whose linears may all take their columns in another order.
    """
    return _Shuffler(probe, reference, noise).find(peers, sites)


class _Shuffler:
    """Asks the questions of the page above."""

    def __init__(self, probe: Probe, reference: Trace, noise: float) -> None:
        self.probe, self.reference, self.noise = probe, reference, noise
        self.random = torch.Generator().manual_seed(3)

    def find(self, peers: Sequence[Sequence[str]], sites: list[Site]) -> list[Site]:
        if not math.isfinite(self.noise) or not self.reference.outputs:
            return sites  # nothing to see a change in
        feeders = self._feeders(peers, sites)
        candidates = {site.name: list(_candidates(site, feeders[site.name], self._rows)) for site in sites}
        found: dict[str, Carriers] = {}
        while any(candidates.values()):
            trials: dict[str, Trial] = {}
            for site in sites:
                if candidates[site.name]:
                    carriers = candidates[site.name].pop(0)
                    order = self._random_order(carriers, site.channels)
                    if carriers.sources(order) is not None:
                        trials[site.name] = (site, carriers, order)
            for name in trials.keys() - self._wrong(list(trials.values())):
                found[name] = trials[name][1]
                candidates[name] = []
        return [replace(site, carriers=found.get(site.name)) for site in sites]

    def _rows(self, name: str) -> int:
        return len(weight_of(self.probe.linears[name]))

    def _feeders(self, peers: Sequence[Sequence[str]], sites: list[Site]) -> dict[str, list[str]]:
        """Name of a site -> names of the linears that feed it."""
        feeders: dict[str, list[str]] = {site.name: [] for site in sites}
        for names in peers:
            fed = self._changed(names, sites)
            number = dict.fromkeys(fed, 0)
            for bit in range((len(names) - 1).bit_length()) if fed else ():
                for site in self._changed([name for i, name in enumerate(names) if i >> bit & 1], sites) & fed:
                    number[site] += 1 << bit
            for site, index in number.items():
                if index < len(names):
                    feeders[site].append(names[index])
        return feeders

    def _changed(self, names: Sequence[str], sites: list[Site]) -> set[str]:
        """Names of the sites whose inputs change if the rows of these linears are shuffled."""
        trace = self.probe.run(
            {},
            orders={
                name: torch.randperm(self._rows(name), generator=self.random, dtype=torch.int64, device="cpu") for name in names
            },
        )
        return {site.name for site in sites if not all(self._agrees(trace, name) for name in site.linears)}

    def _agrees(self, trace: Trace, name: str, order: Tensor | None = None) -> bool:
        """Whether a linear's input is that of the reference, or the same with its channels in this ``order``."""
        before, after = self.reference.inputs.get(name, []), trace.inputs.get(name, [])
        return len(before) == len(after) and all(
            self._close(a if order is None else a[..., order.to(a.device)], b) for a, b in zip(before, after, strict=True)
        )

    def _close(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors agree but for the order in which a vector unit adds up the same sums."""
        return distance(a, b) <= 16 * torch.finfo(a.dtype).eps + 10 * self.noise

    def _random_order(self, carriers: Carriers, channels: int) -> Tensor:
        """A random permutation of channels within runs; runs that are fed by the same rows are permuted alike."""
        _, rows = carriers.rows[0]
        keys = torch.rand(int(rows.max()) + 1, generator=self.random, dtype=torch.float32, device="cpu")[rows].view(
            -1, carriers.span
        )
        starts = torch.arange(0, channels, carriers.span, dtype=torch.int64, device="cpu")[:, None]
        return (keys.argsort(dim=1, stable=True) + starts).flatten()

    def _wrong(self, trials: list[Trial]) -> set[str]:
        """Names of the sites whose trial fails."""
        if not trials:
            return set()
        sources: dict[str, Tensor] = {}
        orders: dict[str, Tensor] = {}
        for site, carriers, order in trials:
            for name, source in (carriers.sources(order) or {}).items():
                if name in sources:  # two sites would reorder one linear
                    return {site.name} | self._wrong([trial for trial in trials if trial[0] is not site])
                sources[name] = torch.cat(
                    [source, torch.arange(len(source), self._rows(name), dtype=torch.int64, device="cpu")]
                )
            orders |= dict.fromkeys(site.linears, order)
        trace = self.probe.run({}, orders=sources)
        wrong = {site.name for site, _, _ in trials if not all(self._agrees(trace, n, orders[n]) for n in site.linears)}
        if self._nothing_else_changed(trace, orders.keys()):
            return wrong
        if wrong:  # what else changed may be their doing
            return wrong | self._wrong([trial for trial in trials if trial[0].name not in wrong])
        if len(trials) == 1:
            return {trials[0][0].name}
        middle = len(trials) // 2
        return self._wrong(trials[:middle]) | self._wrong(trials[middle:]) or {site.name for site, _, _ in trials}

    def _nothing_else_changed(self, trace: Trace, reordered: Collection[str]) -> bool:
        """Whether the outputs of the model, and the inputs of linears not among ``reordered``, are those of the reference."""
        before, after = self.reference.outputs, trace.outputs
        outputs = len(before) == len(after) and all(map(self._close, before, after))
        return outputs and all(self._agrees(trace, name) for name in self.reference.inputs if name not in reordered)


def _candidates(site: Site, feeders: Sequence[str], rows: Callable[[str], int]) -> Iterator[Carriers]:
    """What may carry the channels of a site, the likeliest first.

    A linear that feeds it may have several times as many rows as the site has channels, as a fused gate and up. Its parts then
    come one after the other, or interleaved.

    Args:
        feeders: names of the linears that feed the site.
        rows: tells how many rows a linear has.
    """
    k, producer = site.channels, site.producer
    alone = None
    if producer is not None and producer.kind == "linear":
        alone = ((producer.module, producer.rows.cpu()),)
        yield Carriers(alone, k)
    parts = {name: rows(name) // k for name in feeders}
    if feeders and all(rows(name) % k == 0 for name in feeders):
        channels = torch.arange(k, dtype=torch.int64, device="cpu")
        yield Carriers(tuple((name, channels + i * k) for name in feeders for i in range(parts[name])), k)
        if max(parts.values()) > 1:
            yield Carriers(tuple((name, channels * n + i) for name, n in parts.items() for i in range(n)), k)
    if alone is not None:
        for count in range(2, min(MOST_RUNS, k // SHORTEST_RUN) + 1):
            if k % count == 0:
                yield Carriers(alone, k // count)
