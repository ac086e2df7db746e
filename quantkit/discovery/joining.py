"""Linears joined into sites: those that read one tensor, and those whose inputs are written by the same rows."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from quantkit.core.sites import Kept, Producer, Site
from quantkit.discovery.kept import first_fixed
from quantkit.discovery.probe import Trace
from quantkit.discovery.prober import Origin
from quantkit.model.modules import weight_of

MIXES = "no module writes these channels one by one"
UNEQUAL = "another linear reads these channels in vectors of another length"


def join(
    linears: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    reference: Trace,
    origins: Mapping[str, Origin],
    kept: Mapping[str, Kept],
) -> list[Site]:
    """The sites of a model, each with the producer that explains the inputs of all of its linears, or the reason for none.

    Args:
        linears: name -> module.
        norms: the same for what writes channels besides linears.
        reference: a pass of the probe, which shows which linears read the very same tensor.
        origins: name of a linear -> where its input comes from, where that is known.
        kept: linears that stay in floating point; a site of such linears alone is left out.
    """
    sites = []
    for names, alone in _of_one_width(_sharing_input(reference, origins), linears):
        if all(name in kept for name in names):
            continue
        first_of_tensor = {tuple(reference.identities[name]): name for name in reversed(names)}
        producer, reason = _common_producer(names, linears, norms, reference, origins, kept) if alone else (None, UNEQUAL)
        sites.append(
            Site(
                name=names[0],
                linears=tuple(names),
                taps=tuple(reversed(first_of_tensor.values())),
                channels=weight_of(linears[names[0]]).shape[1],
                producer=producer,
                reason=reason,
            )
        )
    return sites


def _sharing_input(reference: Trace, origins: Mapping[str, Origin]) -> list[list[str]]:
    """Names of linears in sets that read one tensor, or tensors of one module, directly or through others of the set."""
    parent = {name: name for name in reference.inputs}  # a forest: linears of one set have one root

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    readers: dict[Hashable, str] = {}
    for name in reference.inputs:
        for tensor in reference.identities[name]:
            parent[root(name)] = root(readers.setdefault(tensor, name))
        if name in origins:
            parent[root(name)] = root(readers.setdefault(origins[name].module, name))
    members: dict[str, list[str]] = {}
    for name in reference.inputs:
        members.setdefault(root(name), []).append(name)
    return list(members.values())


def _of_one_width(sets: list[list[str]], linears: Mapping[str, nn.Module]) -> Iterator[tuple[list[str], bool]]:
    """The sets, taken apart into linears with equally many input channels, and whether there was nothing to take apart.

    One tensor may be read in whole by one linear and head by head by another, which have no channels in common.
    """
    for names in sets:
        widths: dict[int, list[str]] = {}
        for name in names:
            widths.setdefault(weight_of(linears[name]).shape[1], []).append(name)
        for some in widths.values():
            yield some, len(widths) == 1


def _common_producer(
    names: Sequence[str],
    linears: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    reference: Trace,
    origins: Mapping[str, Origin],
    kept: Mapping[str, Kept],
) -> tuple[Producer | None, str]:
    """The producer of a site with these linears, or None and the reason."""
    origin = origins.get(names[0])
    if origin is None or not all(name in origins and origins[name].same_as(origin) for name in names):
        return None, MIXES
    fixed = first_fixed([*names, origin.module], kept)
    if fixed is not None:
        return None, f"{fixed} {'writes' if fixed == origin.module else 'reads'} it: {kept[fixed]}"
    block = origin.module.rpartition(".")[0]
    inside = [name for name in linears if not block or name.startswith(f"{block}.")]
    unseen = first_unseen(inside, weight_of(linears[names[0]]).shape[1], linears, reference)
    if unseen is not None:
        return None, f"{unseen} never ran in the probe and may read it too"
    other = unseen_double(origin.module, {**norms, **linears}, reference.reached)
    if other is not None:
        return None, f"{other} never ran in the probe and may write it too"
    kind: Literal["linear", "norm"] = "linear" if origin.module in linears else "norm"
    return Producer(origin.module, kind, origin.rows, origin.power), ""


def first_unseen(names: Sequence[str], channels: int, linears: Mapping[str, nn.Module], reference: Trace) -> str | None:
    """The first of these linears that never ran in the probe and has so many input channels: it may be one more reader."""
    unseen = (name for name in names if name not in reference.inputs and weight_of(linears[name]).shape[1] == channels)
    return next(unseen, None)


def unseen_double(producer: str, modules: Mapping[str, nn.Module], ran: Container[str]) -> str | None:
    """A module beside ``producer`` that is like it and never ran: other tokens, such as those of images, may go through it."""
    block, like = producer.rpartition(".")[0], modules[producer]

    def shapes(module: nn.Module) -> list[torch.Size]:
        return [p.shape for p in module.parameters(recurse=False)]

    beside = (n for n in modules if n.rpartition(".")[0] == block and n != producer and n not in ran)
    return next((n for n in beside if type(modules[n]) is type(like) and shapes(modules[n]) == shapes(like)), None)
