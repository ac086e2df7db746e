"""Linears whose weights are read by the code around them, which a layer with integers in their place would lead astray.

Code may cast its input to ``self.proj.weight.dtype``, take a norm over a weight, or sum over ``self.mlp.parameters()``. Whether
it minds what it finds is tried out: in the probe no linear multiplies by its weight, so a pass in which weights look like those
of INT8 layers has to show what it showed before. Code that only asks for a device or a shape passes, and so does code that
knows integers, as that of T5 does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.discovery.distances import largest_distance
from quantkit.discovery.places import peers_of
from quantkit.discovery.probe import Probe, TopKWatch, Trace
from quantkit.model.modules import weight_of

log = logging.getLogger("quantkit")


def read_by_others(probe: Probe, reference: Trace) -> set[str]:
    """Names of the linears whose weight or bias is read by something else, in a way that changes what the model computes.

    Args:
        probe: runs the model.
        reference: a pass of it with nothing changed, under a :class:`.probe.TopKWatch`, which keeps torch from its fast paths.
    """
    search = _Search(probe, reference)
    names = {name: len(weight_of(linear)) for name, linear in probe.linears.items()}
    if search.harmless(list(names)):
        return set()
    search.noise = _apart(reference, probe.run({}, watch=TopKWatch()))
    for peers in peers_of(probe.model, names):
        search.take(peers)
    return search.read


class _Search:
    """Hides more and more linears, and finds those that cannot be hidden.

    Attributes:
        read: names of these.
        noise: by how much two passes differ in which nothing was changed.
    """

    def __init__(self, probe: Probe, reference: Trace) -> None:
        self.probe, self.reference, self.noise = probe, reference, 0.0
        self.read: set[str] = set()
        self._hidden: list[str] = []

    def harmless(self, names: Sequence[str]) -> bool:
        """Whether the model computes the same if these are hidden, besides those that are."""
        try:
            trace = self.probe.run({}, watch=TopKWatch(), hidden=[*self._hidden, *names])
        except Exception as error:  # noqa: BLE001  of the model's code, which may raise anything
            log.debug("hiding the weights of %s and others: %s", names[0], error)
            return False
        return _apart(self.reference, trace) <= 10 * self.noise

    def take(self, names: Sequence[str]) -> None:
        """Hide linears at one place of every block. If both halves of them are read, all are taken for read."""
        if self.harmless(names):
            self._hidden += names
            return
        middle = len(names) // 2
        halves = [half for half in (names[:middle], names[middle:]) if half]
        wrong = [half for half in halves if not self.harmless(half)]
        if len(halves) == 2 and len(wrong) == 1:
            self._hidden += next(half for half in halves if half not in wrong)
            self.take(wrong[0])
        else:
            self.read.update(names)


def _apart(before: Trace, after: Trace) -> float:
    """The largest distance between what linears read in two passes, or between the outputs. Other dtypes are infinitely far."""
    if before.inputs.keys() != after.inputs.keys():
        return float("inf")
    pairs = [(before.outputs, after.outputs), *((before.inputs[name], after.inputs[name]) for name in before.inputs)]
    if any([x.dtype for x in a] != [x.dtype for x in b] for a, b in pairs):
        return float("inf")
    return max(largest_distance(list(map(_finite, a)), list(map(_finite, b))) for a, b in pairs)


def _finite(x: Tensor) -> Tensor:
    """``x`` with zeros for what is not a number, which differs from itself."""
    return torch.where(x.isnan(), 0.0, x) if x.is_floating_point() else x
