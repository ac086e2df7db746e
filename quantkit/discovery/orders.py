"""Whose rows may be reordered so that the channels of a site arrive in another order: asked of the probe, site by site.

A factor needs a linear path behind its producer; an order does not. Any element-wise function carries it, so fc1 -> GELU ->
fc2 qualifies; a product carries it if both sides are reordered, as gate and up are; attention carries it within a head.

1. The rows of each class of linears are shuffled. Sites whose input changes are fed by it; by which member, a few more passes
   over half of the members tell, as the bits of its number.
2. Candidates are shuffled by one permutation for each site: the producer alone, or everything that feeds the site. The input
   must be the old one in the new order, and nothing else in the model may change. If it does, the sites are halved until the
   culprits stand alone.
3. Where not all channels may change places, those of one run may: runs are shortened until they are as wide as a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.core.sites import Carriers, Site
from quantkit.discovery.probe import Probe, Trace
from quantkit.model.modules import weight_of

SHORTEST, MOST_RUNS = 4, 256
"""A run of channels that is shorter, or one of more, is no head."""


def with_carriers(
    probe: Probe, reference: Trace, noise: float, groups: Sequence[Sequence[str]], sites: list[Site]
) -> list[Site]:
    """``sites`` with the carriers of those where some were proven.

    Args:
        probe, reference, noise: the model, a pass without changes, and how far two of these are apart.
        groups: names of linears at the same place in every block.
        sites: whose linears may all take their columns in another order.
    """
    return _Shuffler(probe, reference, noise).find(groups, sites)


class _Shuffler:
    def __init__(self, probe: Probe, reference: Trace, noise: float) -> None:
        self.probe, self.reference, self.noise = probe, reference, noise
        self.random = torch.Generator().manual_seed(3)

    def find(self, groups: Sequence[Sequence[str]], sites: list[Site]) -> list[Site]:
        if not math.isfinite(self.noise) or not self.reference.outputs:
            return sites  # nothing to see a change in
        feeders = self._feeders(groups, sites)
        candidates = {site.name: list(_candidates(site, feeders[site.name], self._rows)) for site in sites}
        found: dict[str, Carriers] = {}
        while any(candidates.values()):
            trial = {}
            for site in sites:
                if candidates[site.name]:
                    carriers = candidates[site.name].pop(0)
                    order = self._order(carriers, site.channels)
                    if carriers.sources(order) is not None:
                        trial[site.name] = (site, carriers, order)
            for name in trial.keys() - self._culprits(list(trial.values())):
                found[name] = trial[name][1]
                candidates[name] = []
        return [replace(site, carriers=found.get(site.name)) for site in sites]

    def _rows(self, name: str) -> int:
        return len(weight_of(self.probe.linears[name]))

    def _feeders(self, groups: Sequence[Sequence[str]], sites: list[Site]) -> dict[str, list[str]]:
        """Site -> the linears whose outputs it is made of."""
        feeders: dict[str, list[str]] = {site.name: [] for site in sites}
        for group in groups:
            fed = self._changed(group, sites)
            number = dict.fromkeys(fed, 0)
            for bit in range((len(group) - 1).bit_length()) if fed else ():
                for name in self._changed([m for i, m in enumerate(group) if i >> bit & 1], sites) & fed:
                    number[name] += 1 << bit
            for name, index in number.items():
                if index < len(group):
                    feeders[name].append(group[index])
        return feeders

    def _changed(self, group: Sequence[str], sites: list[Site]) -> set[str]:
        trace = self.probe.run({}, orders={name: torch.randperm(self._rows(name), generator=self.random) for name in group})
        return {site.name for site in sites if not all(self._agrees(trace, name) for name in site.linears)}

    def _agrees(self, trace: Trace, name: str, order: Tensor | None = None) -> bool:
        """Whether a linear's input is that of the reference, in this order."""
        before, after = self.reference.inputs.get(name, []), trace.inputs.get(name, [])
        return len(before) == len(after) and all(
            self._close(a if order is None else a[..., order.to(a.device)], b) for a, b in zip(before, after, strict=True)
        )

    def _close(self, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        if torch.equal(a, b) or not a.numel():
            return True
        # the same sums, split up in another way by vector units
        a, slack = a.double(), 16 * torch.finfo(a.dtype).eps + 10 * self.noise
        difference, signal = torch.where(a == b, 0.0, a - b.double()), torch.where(a.isinf(), 0.0, a)
        return bool(difference.abs().max() <= slack * signal.abs().max())

    def _order(self, carriers: Carriers, channels: int) -> Tensor:
        """A random permutation within runs, the same for runs that share their rows."""
        _, rows = carriers.rows[0]
        keys = torch.rand(int(rows.max()) + 1, generator=self.random)[rows].view(-1, carriers.span)
        starts = torch.arange(0, channels, carriers.span)[:, None]
        return (keys.argsort(dim=1, stable=True) + starts).flatten()

    def _culprits(self, trial: list[tuple[Site, Carriers, Tensor]]) -> set[str]:
        """Names of sites where the candidate is wrong."""
        if not trial:
            return set()
        sources: dict[str, Tensor] = {}
        orders: dict[str, Tensor] = {}
        for site, carriers, order in trial:
            for name, source in (carriers.sources(order) or {}).items():
                if name in sources:
                    return {site.name} | self._culprits([t for t in trial if t[0] is not site])  # two sites of one linear
                sources[name] = torch.cat([source, torch.arange(len(source), self._rows(name))])
            orders |= dict.fromkeys(site.linears, order)
        trace = self.probe.run({}, orders=sources)
        wrong = {site.name for site, _, _ in trial if not all(self._agrees(trace, n, orders[n]) for n in site.linears)}
        outputs = zip(self.reference.outputs, trace.outputs, strict=True)
        others = all(self._agrees(trace, name) for name in self.reference.inputs if name not in orders)
        if len(trace.outputs) == len(self.reference.outputs) and others and all(self._close(a, b) for a, b in outputs):
            return wrong
        if wrong:  # what else changed may be their doing
            return wrong | self._culprits([t for t in trial if t[0].name not in wrong])
        if len(trial) == 1:
            return {trial[0][0].name}
        middle = len(trial) // 2
        return self._culprits(trial[:middle]) | self._culprits(trial[middle:]) or {site.name for site, _, _ in trial}


def _candidates(site: Site, feeders: Sequence[str], rows: Callable[[str], int]) -> Iterator[Carriers]:
    """What may carry the channels of a site, likeliest first."""
    k, producer = site.channels, site.producer
    alone = None
    if producer is not None and producer.kind == "linear":
        alone = ((producer.module, producer.rows.cpu()),)
        yield Carriers(alone, k)
    parts = {name: rows(name) // k for name in feeders}
    if feeders and all(rows(name) % k == 0 for name in feeders):
        channels = torch.arange(k)
        yield Carriers(tuple((name, channels + i * k) for name in feeders for i in range(parts[name])), k)
        if max(parts.values()) > 1:  # interleaved
            yield Carriers(tuple((name, channels * n + i) for name, n in parts.items() for i in range(n)), k)
    if alone is not None:
        for count in range(2, min(MOST_RUNS, k // SHORTEST) + 1):
            if k % count == 0:
                yield Carriers(alone, k // count)
