"""Linears that stay in floating point by default: adapters, tied ones, output heads, routers, and those never seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from quantkit.core.sites import Kept
from quantkit.discovery.probe import Trace
from quantkit.model.adapters import Adapters
from quantkit.model.modules import weight_of
from quantkit.model.ties import owners_of_memory

ROUTER_NAMES = re.compile(r"(^|\.)(router|gate|shared_expert_gate)$")
"""Routers whose output ends in no top-k call while the probe watches. A hint, taken back by :func:`_gates_channels`."""


def kept_in_float(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    reference: Trace,
    adapters: Adapters,
    routers: set[str],
    heads: set[str],
) -> dict[str, Kept]:
    """Name of a linear that stays in floating point -> the reason.

    Args:
        adapters: of the model.
        reference: a pass of the probe.
        routers: names of linears whose output ended in a top-k choice in this pass.
        heads: names of linears that alone write an output of the model.
    """
    owners = owners_of_memory(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = {}
    for name, linear in linears.items():
        if name in adapters.parts:
            kept[name] = Kept.ADAPTER
        elif len(owners.get(weight_of(linear).data_ptr(), ())) > 1:
            kept[name] = Kept.TIED
        elif linear is head or name in heads:
            kept[name] = Kept.HEAD
        elif name in routers or (ROUTER_NAMES.search(name) and not _gates_channels(name, linears)):
            kept[name] = Kept.ROUTER
        elif name not in reference.inputs:
            kept[name] = Kept.NEVER_RAN
    return kept


def first_tied(names: Iterable[str], kept: Mapping[str, Kept]) -> str | None:
    """The first of these linears whose weight is tied to another module, so that its columns may not be changed."""
    return next((name for name in names if kept.get(name) is Kept.TIED), None)


def _gates_channels(name: str, linears: Mapping[str, nn.Module]) -> bool:
    """Whether a linear called "gate" is that of a gated activation: it has as many rows as a neighbour has input channels."""
    block = name.rpartition(".")[0]
    width = weight_of(linears[name]).shape[0]
    return any(other.rpartition(".")[0] == block and weight_of(linear).shape[1] == width for other, linear in linears.items())
