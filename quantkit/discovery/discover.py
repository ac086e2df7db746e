"""discover(): from a model and a batch to its sites, in one straight line. Each step is a file of this room."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.sites import Discovery, Kept, Site
from quantkit.discovery.joining import first_unseen, join
from quantkit.discovery.kept import Seen, first_fixed, kept_in_float
from quantkit.discovery.norms import with_absorb_rules
from quantkit.discovery.orders import with_carriers
from quantkit.discovery.places import peers_of, place_of
from quantkit.discovery.probe import Probe, TopKWatch, Trace, norms_of
from quantkit.discovery.prober import Prober
from quantkit.discovery.readers import read_by_others
from quantkit.discovery.rehearsal import arriving_shifts, rehearse
from quantkit.model.adapters import Adapters
from quantkit.model.compiled import eagerly, uncompiled
from quantkit.model.guard import Guard
from quantkit.model.modules import call, evaluating, linears_of, weight_of


@eagerly
def discover(
    model: nn.Module, batch: Any, *, carriers: bool = False, heads: bool = False, real: Collection[str] = ()
) -> Discovery:
    """Find the sites of ``model`` by running it on a small ``batch``; the model is only watched, never changed.

    Args:
        model: any module, in any dtype, with its weights in memory.
        batch: a tensor, a dict of keyword arguments or a tuple of arguments, with at least two tokens.
        carriers: also find out for each site which rows can be reordered in place of its channels. This takes more passes.
        heads: also make a site of an output head that reads an activation alone, since it is to be quantized too.
        real: names of linears that compute what they do, since the model does not run with made-up values in their places.
            Nothing is found out about them.

    Returns:
        The sites, and the linears that are kept in floating point with the reason for each.

    Raises:
        CalibrationError: ``batch`` is of another type.
    """
    model = uncompiled(model)
    guard = Guard(model)
    try:
        return _discover(model, batch, carriers=carriers, heads=heads, real=real)
    finally:
        guard.give_back()


def _discover(model: nn.Module, batch: Any, *, carriers: bool, heads: bool, real: Collection[str]) -> Discovery:
    linears = {name: m for name, m in linears_of(model).items() if name not in real}
    norms, adapters = norms_of(model), Adapters.of(model)
    probe = Probe(model, linears, norms, batch)
    watch = TopKWatch()
    reference = probe.run({}, watch=watch)
    prober = Prober(probe, reference)

    origins, found_heads = prober.origins()
    seen = Seen(watch.routers, found_heads, read_by_others(probe, reference), set(adapters.parts))
    kept = kept_in_float(model, linears, reference, seen)
    left_out = {name: why for name, why in kept.items() if not heads or why is not Kept.HEAD}
    sites = join(linears, norms, reference, origins, left_out)
    sites = [_with_parameters(_apart_from(adapters, site), linears, norms, reference) for site in sites]
    sites = _rehearsed(model, batch, sites)
    sites = _with_proven_shifts(model, batch, sites, linears)
    if carriers:
        sites = [_apart_from(adapters, site) for site in _with_carriers(prober, sites, kept)]
    return Discovery(sites=tuple(sites), kept=kept)


UNKNOWN = "the model does not run while its linears put out made-up values"


def runs(model: nn.Module, batch: Any, real: Collection[str], *, passes: int = 1) -> bool:
    """Whether the model runs while all linears but those called ``real`` put out made-up values.

    All but the first of several ``passes`` multiply these by random powers of two, as :func:`discover` does.
    """
    linears = {name: linear for name, linear in linears_of(model).items() if name not in real}
    random = torch.Generator().manual_seed(0)
    try:
        probe = Probe(model, linears, {}, batch)
        for again in range(passes):
            powers = {
                name: torch.exp2(
                    torch.randint(0, 4, (len(weight_of(m)),), generator=random, dtype=torch.int64, device="cpu").float()
                )
                for name, m in linears.items()
                if again
            }
            probe.run(powers)
    except Exception:  # noqa: BLE001  the model may raise anything
        return False
    return True


def cause_of_failure(model: nn.Module, batch: Any, ignored: Sequence[str]) -> str | None:
    """Name of a linear with which the model runs if it computes what it does, beside those that are ``ignored``.

    Half of the linears are real, then half of these, and so on, so that few passes tell. None if one alone is not enough.
    """
    names = [name for name in linears_of(model) if name not in ignored]
    while len(names) > 1:
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        names = next((half for half in halves if runs(model, batch, [*half, *ignored])), [])
    return names[0] if names and runs(model, batch, [*names, *ignored], passes=4) else None


def linears_alone(model: nn.Module, batch: Any) -> Discovery:
    """What can be said of a model that does not run with made-up values: which linears run, and that each is to be kept apart.

    Nothing is known of what writes their inputs, so that nothing can be folded. Heads and routers are known by their names, and
    whether a weight is read by others is not.
    """
    linears = linears_of(model)
    ran: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            ran[name] = []

        return hook

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(note(name)).remove)
        stack.enter_context(evaluating(model))
        call(model, batch)
    kept = kept_in_float(model, linears, Trace(inputs=ran), Seen(set(), set(), set(), set(Adapters.of(model).parts)))
    alone = (Site(n, (n,), (n,), weight_of(linears[n]).shape[1], reason=UNKNOWN) for n in ran if n not in kept)
    return Discovery(sites=tuple(alone), kept=kept)


def _apart_from(adapters: Adapters, site: Site) -> Site:
    """``site`` without a producer or carriers that an adapter is in the way of.

    What an adapter reads and adds to stays as it is, so that it means the same on the model that it was made for. The probe may
    see nothing of an adapter, since most of them begin as zero.
    """
    written = [name for name, _ in site.carriers.rows] if site.carriers else []
    if not adapters.reach.isdisjoint([*site.linears, *written]):
        site = replace(site, carriers=None)
    if site.producer and not adapters.reach.isdisjoint([*site.linears, site.producer.module]):
        site = replace(site, producer=None, reason="an adapter is in the way")
    return site


def _with_parameters(site: Site, linears: Mapping[str, nn.Module], norms: Mapping[str, nn.Module], reference: Trace) -> Site:
    """``site`` with what folding needs to know of its producer's parameters; a norm that cannot absorb a factor is none."""
    producer = site.producer
    if producer is None:
        return site
    if producer.kind == "linear":
        return replace(site, producer=replace(producer, bias=None if linears[producer.module].bias is None else "bias"))
    ruled = with_absorb_rules(producer, norms[producer.module], reference)
    reason = "" if ruled else f"{producer.module} has no per-channel parameter that scales it"
    return replace(site, producer=ruled, reason=reason)


def _rehearsed(model: nn.Module, batch: Any, sites: list[Site]) -> list[Site]:
    """``sites`` without those producers whose fold changes the real model on the real batch."""
    wrong = rehearse(model, batch, [site for site in sites if site.producer])
    return [replace(s, producer=None, reason="the rehearsal changed the model") if s.name in wrong else s for s in sites]


def _with_proven_shifts(model: nn.Module, batch: Any, sites: list[Site], linears: Mapping[str, nn.Module]) -> list[Site]:
    """``sites`` whose producers have a bias only where a shift of it arrives unchanged and every reader can make up for it."""
    biased: dict[str, list[Site]] = {}
    for site in sites:
        producer = site.producer
        readers_have_biases = all(linears[name].bias is not None for name in site.linears)
        if producer is not None and producer.bias and producer.power == 1 and readers_have_biases:
            biased.setdefault(place_of(model, producer.module), []).append(site)
    # Place by place, since a shift that does not arrive would spoil what is behind it.
    shifts = {name: shift for some in biased.values() for name, shift in arriving_shifts(model, batch, some).items()}
    proven = shifts.keys() - rehearse(model, batch, [site for site in sites if site.name in shifts], shifts)

    def without_bias(site: Site) -> Site:
        return site if site.producer is None else replace(site, producer=replace(site.producer, bias=None))

    return [site if site.name in proven else without_bias(site) for site in sites]


def _with_carriers(prober: Prober, sites: list[Site], kept: Mapping[str, Kept]) -> list[Site]:
    """``sites`` with the carriers of those where some were proven and all weights may be changed."""
    probe, reference = prober.probe, prober.reference
    peers = [names for names in peers_of(probe.model, prober.rows) if names[0] in probe.linears]
    movable = [site for site in sites if _may_be_reordered(site, probe.linears, reference, kept)]
    carried = {}
    for site in with_carriers(probe, reference, prober.noise, peers, movable):
        fixed = site.carriers is not None and first_fixed((name for name, _ in site.carriers.rows), kept)
        carried[site.name] = replace(site, carriers=None) if fixed else site
    return [carried.get(site.name, site) for site in sites]


def _may_be_reordered(site: Site, linears: Mapping[str, nn.Module], reference: Trace, kept: Mapping[str, Kept]) -> bool:
    """Whether the columns of its linears may be reordered, as far as one can tell without knowing who writes the channels.

    Behind a norm they may not: the residual stream would need the same order for all of its readers.
    """
    if site.producer is not None and site.producer.kind == "norm":
        return False
    blocks = {name.rpartition(".")[0] for name in site.linears}
    beside = [name for name in linears if name.rpartition(".")[0] in blocks]
    return first_unseen(beside, site.channels, linears, reference) is None and first_fixed(site.linears, kept) is None
