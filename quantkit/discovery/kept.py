"""Linears that stay in floating point: adapters, tied ones and those that others read; heads, routers and others unless asked
for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from quantkit.core.sites import Kept
from quantkit.discovery.probe import Trace
from quantkit.model.modules import weight_of
from quantkit.model.targets import asked_in_float32
from quantkit.model.ties import owners_of_memory

ROUTER_NAMES = re.compile(r"(^|\.)(router|gate|shared_expert_gate)$")
"""Routers whose output ends in no top-k call while the probe watches. A hint, taken back by :func:`_gates_channels`."""


class Seen(NamedTuple):
    """Names of linears that were seen in a part of their own.

    Attributes:
        routers: their output ended in a top-k choice.
        heads: they alone write an output of the model.
        read: their weight or bias is read by something else.
        adapters: they are a part of an adapter.
    """

    routers: set[str]
    heads: set[str]
    read: set[str]
    adapters: set[str]


def kept_in_float(model: nn.Module, linears: Mapping[str, nn.Module], reference: Trace, seen: Seen) -> dict[str, Kept]:
    """Name of a linear that stays in floating point -> the reason; ``reference`` is a pass of the probe."""
    owners = owners_of_memory(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    float32 = asked_in_float32(model, linears)
    kept = {}
    for name, linear in linears.items():
        if name in seen.adapters:
            kept[name] = Kept.ADAPTER
        elif len(owners.get(weight_of(linear).data_ptr(), ())) > 1:
            kept[name] = Kept.TIED
        elif name in seen.read:
            kept[name] = Kept.READ
        elif linear is head or name in seen.heads:
            kept[name] = Kept.HEAD
        elif name in seen.routers or (ROUTER_NAMES.search(name) and not _gates_channels(name, linears)):
            kept[name] = Kept.ROUTER
        elif name in float32:
            kept[name] = Kept.FLOAT32
        elif name not in reference.inputs:
            kept[name] = Kept.NEVER_RAN
    return kept


def first_fixed(names: Iterable[str], kept: Mapping[str, Kept]) -> str | None:
    """The first of these linears whose weight belongs to others too, so that its rows and columns may not be changed."""
    return next((name for name in names if kept.get(name) in (Kept.TIED, Kept.READ)), None)


def _gates_channels(name: str, linears: Mapping[str, nn.Module]) -> bool:
    """Whether a linear called "gate" is that of a gated activation: it has as many rows as a neighbour has input channels."""
    block = name.rpartition(".")[0]
    width = weight_of(linears[name]).shape[0]
    return any(other.rpartition(".")[0] == block and weight_of(linear).shape[1] == width for other, linear in linears.items())
