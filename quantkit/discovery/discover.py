"""Sites, found and proven. No architecture is named here, and none is special.

1. Linears that read the same tensor form a site.
2. Every norm, and the rows of every linear, are multiplied by random powers of two, one class of modules ("layers.#.norm")
   in one pass. A linear whose input carries exactly these multipliers is a consumer; anything else that changes (another
   linear's input, the model's output) is a leak, and then the producer cannot be folded. This is the completeness proof.
3. A few more passes spell the number of each producer row in base 4, and so give the map row -> channel, with the
   repetitions of grouped-query attention.
4. Producers that mix (a fused qkv) are tried again with the row layouts that fused projections use.
5. Norms are replayed alone to learn how their parameters absorb a factor: p*c, or (1+p)*c - 1.
6. All folds are rehearsed together with exact powers of two on the real model and real data (:mod:`.verify`), and then shifts,
   where a producer and all that read it have a bias.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.core.sites import Discovery, Producer, Site
from quantkit.discovery.equivalence import arriving_shifts, rehearse
from quantkit.discovery.orders import with_carriers
from quantkit.discovery.probe import Probe, TopKWatch, Trace, norms_of
from quantkit.model.modules import linears_of, map_tensors, weight_of

ROUTER_NAMES = re.compile(r"(^|\.)(router|gate|shared_expert_gate)$")
"""Routers that choose without a top-k call in their own pass; the probe finds the rest."""

NEVER_RAN = "it never ran in the probe"
LEAKS = "its output is read by something besides the linears"
MIXES = "no module writes these channels one by one"


ABSORB: tuple[Literal["scale", "offset"], ...] = ("scale", "offset")


class Mixed:
    """A linear's input changed in a way that is no per-channel factor."""


MIXED = Mixed()
Response = Tensor | Mixed | None


def discover(model: nn.Module, batch: Any, *, carriers: bool = False) -> Discovery:
    """Find the sites of ``model`` on a small ``batch``; the model is only watched, never changed.

    Args:
        model: any module, in any dtype, with its weights in memory.
        batch: a tensor, dict of keyword arguments or tuple of arguments, with at least two tokens.
        carriers: also find out whose rows may be reordered, see :mod:`.carriers`.

    Returns:
        The sites, and the linears that are kept in floating point with the reason for each.
    """
    linears, norms = linears_of(model), norms_of(model)
    probe = Probe(model, linears, norms, batch)
    watch = TopKWatch()
    reference = probe.run({}, mode=watch)
    prober = _Prober(probe, reference)

    found, heads = prober.producers()
    kept = _kept(model, linears, reference, watch.routers, heads)
    sites = _sites(linears, reference, found, kept)
    sites = [_with_fold_rule(site, linears, norms, reference) for site in sites]
    unfoldable = rehearse(model, batch, [site for site in sites if site.producer])
    sites = [replace(s, producer=None, reason="the rehearsal changed the model") if s.name in unfoldable else s for s in sites]
    biased: dict[str, list[Site]] = {}
    for site in sites:
        readers = (linears[name] for name in site.linears)
        if site.producer and site.producer.bias and site.producer.power == 1 and all(x.bias is not None for x in readers):
            biased.setdefault(_place(model, site.producer.module), []).append(site)
    # place by place: one that goes wrong would spoil what comes behind it
    shifts = {name: d for some in biased.values() for name, d in arriving_shifts(model, batch, some).items()}
    arrived = shifts.keys() - rehearse(model, batch, [site for site in sites if site.name in shifts], shifts)
    sites = [site if site.name in arrived else _rigid(site) for site in sites]
    if carriers:
        groups = [group for group in _classes(model, prober.rows) if group[0] in linears]
        movable = [site for site in sites if _may_be_reordered(site, linears, reference, kept)]
        movable = with_carriers(probe, reference, prober.noise, groups, movable)
        carried = {site.name: _untied(site, kept) for site in movable}
        sites = [carried.get(site.name, site) for site in sites]
    return Discovery(sites=tuple(sites), kept=kept)


def _may_be_reordered(site: Site, linears: dict[str, nn.Module], reference: Trace, kept: dict[str, str]) -> bool:
    """Whether its linears may take their columns in another order, as far as one can tell without asking who writes them."""
    if site.producer is not None and site.producer.kind == "norm":
        return False  # the residual stream has no order of its own for each reader
    blocks = {name.rpartition(".")[0] for name in site.linears}
    unseen = (name for name in linears if name not in reference.inputs and weight_of(linears[name]).shape[1] == site.channels)
    return not any(name.rpartition(".")[0] in blocks for name in unseen) and not _tied(site.linears, kept)


def _untied(site: Site, kept: dict[str, str]) -> Site:
    tied = site.carriers is not None and _tied([name for name, _ in site.carriers.rows], kept)
    return replace(site, carriers=None) if tied else site


def _tied(names: Sequence[str], kept: dict[str, str]) -> bool:
    return any(kept.get(name, "").startswith("its weight is tied") for name in names)


class _Prober:
    """Asks the questions of the module docstring and keeps the answers."""

    def __init__(self, probe: Probe, reference: Trace) -> None:
        self.probe, self.reference = probe, reference
        again = probe.run({})
        self.noise = max(
            (_distance(a, b) for a, b in zip(reference.outputs, again.outputs, strict=True)),
            default=0.0,
        )
        self.random = torch.Generator().manual_seed(0)
        self.rows = {name: len(weight_of(m)) for name, m in probe.linears.items() if name in reference.inputs}
        self.rows |= reference.norm_widths

    def producers(self) -> tuple[dict[str, tuple[str, Tensor, int]], set[str]]:
        """Consumer -> (producer, rows [K], power), and the linears that write the model's output."""
        found: dict[str, tuple[str, Tensor, int]] = {}
        heads: set[str] = set()
        fused: list[tuple[list[str], set[str]]] = []
        for group in _classes(self.probe.model, self.rows):
            clean, mixed, leaked = self._ask(group)
            if not clean and leaked and not mixed:
                heads.update(name for name in group if self._is_head(name))
            if clean and (mixed or leaked) and len(group) > 1:
                # one member's leak may hide its neighbours' answers: ask one by one
                group, clean = self._one_by_one(group, heads)
                found.update(self._decode(group, clean))
            elif clean and not mixed and not leaked:
                found.update(self._decode(group, clean))
                fused.append((group, clean.keys() - found.keys()))  # a product of its rows: parts of it may still scale
            elif mixed and not clean:
                fused.append((group, mixed))
        for group, consumers in fused:
            if consumers - found.keys() and group[0] in self.probe.linears:
                found.update(self._unfuse(group, consumers - found.keys()))
        return found, heads

    def _one_by_one(self, group: Sequence[str], heads: set[str]) -> tuple[list[str], dict[str, Tensor]]:
        proven, consumers = [], {}
        for name in group:
            clean, mixed, leaked = self._ask([name])
            if clean and not mixed and not leaked:
                proven.append(name)
                consumers.update(clean)
            elif leaked and not clean and not mixed and self._is_head(name):
                heads.add(name)
        return proven, consumers

    def _ask(self, group: Sequence[str], rows: Tensor | None = None) -> tuple[dict[str, Tensor], set[str], bool]:
        """Multiply these producers; returns the cleanly scaled linears, the mixed ones, and whether outputs changed."""
        trace = self.probe.run(self._multipliers(group, rows))
        clean, mixed = {}, set()
        for name in self.reference.inputs:
            answer = self._response(trace, name)
            if isinstance(answer, Mixed):
                mixed.add(name)
            elif answer is not None:
                clean[name] = answer
        return clean, mixed, self._output_changed(trace)

    def _multipliers(self, group: Sequence[str], rows: Tensor | None) -> dict[str, Tensor]:
        multipliers = {}
        for name in group:
            c = 2.0 ** (1 + 2 * torch.randint(0, 2, (self.rows[name],), generator=self.random).float())
            multipliers[name] = c if rows is None else torch.where(_member(rows, len(c)), c, 1.0)
        return multipliers

    def _output_changed(self, trace: Trace) -> bool:
        pairs = list(itertools.zip_longest(self.reference.outputs, trace.outputs))
        if not pairs or not math.isfinite(self.noise):
            return True  # nothing to see a leak in
        return any(a is None or b is None or _distance(a, b) > 10 * self.noise for a, b in pairs)

    def _response(self, trace: Trace, name: str) -> Response:
        """Per-channel factor [K] between two passes, None where nothing changed, MIXED where it is no such factor."""
        before, after = self.reference.inputs[name], trace.inputs.get(name, [])
        if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
            return MIXED
        factors: Tensor | None = None
        changed = False
        for a, b in zip(before, after, strict=True):
            if torch.equal(a, b):
                factor = torch.ones(a.shape[-1], dtype=torch.float64)
            else:
                changed = True
                measured = _factor(a, b, self.noise)
                if measured is None:
                    return MIXED
                factor = measured
            if factors is not None and not torch.equal(factors, factor):
                return MIXED
            factors = factor
        return factors if changed else None

    def _decode(
        self, group: Sequence[str], clean: dict[str, Tensor], rows: Tensor | None = None
    ) -> dict[str, tuple[str, Tensor, int]]:
        """Spell the index of each producer row in base 4, one digit a pass, and read it at the ``clean`` consumers."""
        starts = list(itertools.accumulate((self.rows[name] for name in group), initial=1))
        digits = next(d for d in itertools.count(1) if 4**d >= starts[-1])
        # _multipliers are 2 and 8, whose squares have even exponents only
        powers = {name: 1 if bool((factor.log2().long() % 2).any()) else 2 for name, factor in clean.items()}
        codes = {name: torch.zeros(len(factor), dtype=torch.long) for name, factor in clean.items()}
        for digit in range(digits):
            multipliers = {}
            for name, start in zip(group, starts, strict=False):
                index = torch.arange(start, start + self.rows[name]) // 4**digit % 4
                if rows is not None:
                    index = torch.where(_member(rows, len(index)), index, 0)
                multipliers[name] = 2.0 ** index.float()
            trace = self.probe.run(multipliers)
            for name in list(codes):
                answer = self._response(trace, name)
                if isinstance(answer, Mixed):
                    del codes[name]
                elif answer is not None:
                    codes[name] += answer.log2().long() // powers[name] * 4**digit
        found = {}
        for name, code in codes.items():
            for member, start in zip(group, starts, strict=False):
                local = code - start
                if bool(((local >= 0) & (local < self.rows[member])).all()):
                    found[name] = (member, local, powers[name])
        return self._confirmed(group, found, rows)

    def _confirmed(
        self, group: Sequence[str], found: dict[str, tuple[str, Tensor, int]], rows: Tensor | None
    ) -> dict[str, tuple[str, Tensor, int]]:
        """Those of ``found`` that foretell one more pass: sums of several rows' digits may look like an index as well."""
        if not found:
            return {}
        multipliers = self._multipliers(group, rows)
        trace = self.probe.run(multipliers)
        confirmed = {}
        for name, (member, local, power) in found.items():
            answer, foretold = self._response(trace, name), multipliers[member][local].double() ** power
            unchanged = answer is None and bool((foretold == 1).all())
            if unchanged or (isinstance(answer, Tensor) and torch.equal(answer, foretold)):
                confirmed[name] = (member, local, power)
        return confirmed

    def _unfuse(self, group: list[str], consumers: set[str]) -> dict[str, tuple[str, Tensor, int]]:
        """Try the row layouts of fused projections until one scales a consumer cleanly, in every channel.

        Rows are ``[heads][parts][width]`` and one part is the wanted one (v of a fused qkv, up of a fused gate/up).
        """
        channels = {self.reference.inputs[name][0].shape[-1] for name in consumers}
        if len(channels) != 1 or len({self.rows[name] for name in group}) != 1:
            return {}
        for rows in _fused_layouts(self.rows[group[0]], channels.pop()):
            clean, mixed, leaked = self._ask(group, rows)
            if clean and not mixed and not leaked and all(bool((factor > 1).all()) for factor in clean.values()):
                return self._decode(group, clean, rows)
        return {}

    def _is_head(self, name: str) -> bool:
        """Whether some output of the model is a function of this linear alone: silence it, and all tokens get the same."""
        trace = self.probe.run({name: torch.zeros(self.rows[name])})
        for before, after in zip(self.reference.outputs, trace.outputs, strict=True):
            rows = after.reshape(-1, after.shape[-1]) if after.dim() else after.reshape(1, 1)
            constant = rows[:1] if len(rows) > 1 else rows[:1, :1]  # over tokens: columns may be masked, or biased later on
            if not torch.equal(before, after) and bool((rows == constant).all()):
                return True
        return False


def _classes(model: nn.Module, rows: dict[str, int]) -> list[list[str]]:
    """Names of modules at the same place in every block, and of the same size."""
    classes: dict[Any, list[str]] = {}
    for name in rows:
        classes.setdefault((_place(model, name), rows[name]), []).append(name)
    return list(classes.values())


def _place(model: nn.Module, name: str) -> str:
    """``name`` with the types of blocks for their numbers.

    A number within a word ("norm1") or in a sequence of unlike modules is no repetition: two such places must not hide
    each other's answers.
    """
    place, parent = [], model
    for part in name.split("."):
        child = parent.get_submodule(part)
        repeated = not isinstance(parent, nn.Sequential) or len({type(m) for m in parent.children()}) == 1
        place.append(f"#{type(child).__name__}" if part.isdigit() and repeated else part)
        parent = child
    return ".".join(place)


def _member(rows: Tensor, n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[rows] = True
    return mask


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest finite value; inf for different shapes or not-a-numbers."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    difference, signal = torch.where(a == b, 0.0, a - b), torch.where(a.isinf(), 0.0, a)  # masked logits are -inf
    value = float(difference.abs().max() / signal.abs().max().clamp_min(1e-30))
    return value if value == value else float("inf")


def _factor(before: Tensor, after: Tensor, noise: float) -> Tensor | None:
    """The powers of two [K] with ``after == before * factor``, or None where there are none."""
    a, b = before.reshape(-1, before.shape[-1]).double(), after.reshape(-1, before.shape[-1]).double()
    energy = a.pow(2).sum(0)
    ratio = torch.where(energy > 0, (a * b).sum(0) / energy.clamp_min(1e-300), 1.0)
    if not bool((ratio > 0).all()) or not bool(torch.isfinite(ratio).all()):
        return None
    factor = torch.exp2(ratio.log2().round())
    # Powers of two commute with rounding, so each element must agree by itself, however small it is.
    slack = 4 * torch.finfo(before.dtype).eps * b.abs() + 10 * noise * b.abs().amax(0)
    return factor.cpu() if bool(((b - a * factor).abs() <= slack).all()) else None


def _fused_layouts(n: int, k: int) -> Iterator[Tensor]:
    """Index sets of one part out of ``[heads][parts][width]`` rows that can cover ``k`` channels, likeliest first.

    Many parts mean many query heads to a key and a value, and the value comes last.
    """
    for parts in range(2, 258):
        if n % parts or k % (n // parts):
            continue
        picked = n // parts
        # As many heads as rows: the parts are interleaved.
        counts = (1,) if parts > 32 else dict.fromkeys(h for h in (*range(1, 257), picked) if picked % h == 0)
        for heads in counts:
            grid = torch.arange(n).view(heads, parts, picked // heads)
            for part in dict.fromkeys((parts - 1, 0, 1)) if parts <= 4 else (parts - 1,):
                yield grid[:, part].reshape(-1)
        if n <= k:  # not fused at all, or keys with values; the whole was asked already
            return
    for heads in (h for h in range(1, 257) if n % h == 0 and k % h == 0):  # two parts of unequal width
        grid = torch.arange(n).view(heads, n // heads)
        for unequal in (grid[:, -k // heads :], grid[:, : k // heads]):
            yield unequal.reshape(-1)


def _kept(
    model: nn.Module, linears: dict[str, nn.Module], reference: Trace, routers: set[str], heads: set[str]
) -> dict[str, str]:
    """Linears that stay in floating point by default, with the reason."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel():
                owners.setdefault(parameter.data_ptr(), set()).add(id(module))
    output = getattr(model, "get_output_embeddings", lambda: None)()
    kept = {}
    for name, linear in linears.items():
        weight = linear.weight
        assert isinstance(weight, Tensor)
        if len(owners.get(weight.data_ptr(), ())) > 1:
            kept[name] = "its weight is tied to another module"
        elif linear is output or name in heads:
            kept[name] = "output head"
        elif name in routers or (ROUTER_NAMES.search(name) and not _gates_channels(name, linears)):
            kept[name] = "router"
        elif name not in reference.inputs:
            kept[name] = NEVER_RAN
    return kept


def _gates_channels(name: str, linears: dict[str, nn.Module]) -> bool:
    """Whether a linear called "gate" is one of a gated activation: as wide as what a neighbour reads."""
    block = name.rpartition(".")[0]
    width = weight_of(linears[name]).shape[0]
    return any(other.rpartition(".")[0] == block and weight_of(linear).shape[1] == width for other, linear in linears.items())


def _sites(
    linears: dict[str, nn.Module],
    reference: Trace,
    found: dict[str, tuple[str, Tensor, int]],
    kept: dict[str, str],
) -> list[Site]:
    """Join linears that read one tensor or share a producer, and attach the producer that explains all of them."""
    parent = {name: name for name in reference.inputs}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    readers: dict[Any, str] = {}
    for name in reference.inputs:
        for key in reference.identities[name]:
            parent[root(name)] = root(readers.setdefault(key, name))
        if name in found:
            parent[root(name)] = root(readers.setdefault(found[name][0], name))
    members: dict[str, list[str]] = {}
    for name in reference.inputs:
        members.setdefault(root(name), []).append(name)

    sites = []
    for names in members.values():
        if all(name in kept for name in names):
            continue
        taps = list({tuple(reference.identities[name]): name for name in reversed(names)}.values())[::-1]
        channels = weight_of(linears[names[0]]).shape[1]
        producer, reason = _common_producer(names, found, linears, reference, kept)
        sites.append(Site(names[0], tuple(names), tuple(taps), channels, producer, reason))
    return sites


def _common_producer(
    names: list[str],
    found: dict[str, tuple[str, Tensor, int]],
    linears: dict[str, nn.Module],
    reference: Trace,
    kept: dict[str, str],
) -> tuple[Producer | None, str]:
    answers = [found.get(name) for name in names]
    first = answers[0]
    if first is None or any(
        a is None or (a[0], a[2]) != (first[0], first[2]) or not torch.equal(a[1], first[1]) for a in answers
    ):
        return None, MIXES
    module, rows, power = first
    tied = [name for name in names if kept.get(name, "").startswith("its weight is tied")]
    if tied:
        return None, f"{tied[0]} reads it and its weight is tied"
    block = module.rpartition(".")[0]
    channels = weight_of(linears[names[0]]).shape[1]
    unseen = [
        name
        for name, linear in linears.items()
        if name not in reference.inputs
        and (not block or name.startswith(f"{block}."))
        and weight_of(linear).shape[1] == channels
    ]
    if unseen:
        return None, f"{unseen[0]} never ran in the probe and may read it too"
    kind: Literal["linear", "norm"] = "linear" if module in linears else "norm"
    return Producer(module, kind, rows, power), ""


def _with_fold_rule(site: Site, linears: dict[str, nn.Module], norms: dict[str, nn.Module], reference: Trace) -> Site:
    """Learn how a norm's parameters absorb a factor, and which of them adds to its output, by replaying it alone; without a
    rule it cannot be folded. Of a linear, the bias adds."""
    if site.producer is None:
        return site
    if site.producer.kind == "linear":
        bias = None if linears[site.producer.module].bias is None else "bias"
        return replace(site, producer=replace(site.producer, bias=bias))
    norm = norms[site.producer.module]
    args, kwargs = map_tensors(reference.norm_calls[site.producer.module], _float32)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        own = {name: p.detach().float() for name, p in norm.named_parameters()}

        def near(changed: dict[str, Tensor], wanted: Tensor) -> bool:
            got = torch.func.functional_call(norm, own | changed, args, kwargs)
            return bool(((got - wanted).abs() <= 1e-5 * wanted.abs().amax()).all())

        plain = torch.func.functional_call(norm, own, args, kwargs)
        names = [name for name, p in own.items() if p.numel() == plain.shape[-1]]
        c = torch.rand(plain.shape[-1], generator=random).to(plain) + 0.5
        for rule in itertools.product(ABSORB, repeat=len(names)):
            rules = dict(zip(names, rule, strict=True))
            if names and near({name: absorb(own[name], c, rules[name]) for name in names}, plain * c):
                bias = next((name for name in names if near({name: own[name] + c}, plain + c)), None)
                return replace(site, producer=replace(site.producer, parameters=rules, bias=bias))
    return replace(site, producer=None, reason=f"{site.producer.module} has no per-channel parameter that scales it")


def _rigid(site: Site) -> Site:
    return site if site.producer is None else replace(site, producer=replace(site.producer, bias=None))


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def absorb(parameter: Tensor, factor: Tensor, rule: str) -> Tensor:
    """A norm's parameter ``[N]`` after its output is multiplied by ``factor [N]``, in the dtype of ``parameter``."""
    return parameter * factor if rule == "scale" else (1 + parameter) * factor - 1
