"""Which module writes the channels of each linear's input, asked of the probe.

All linears at the same place of every block, or all norms there, are asked at once. Their output rows are multiplied by random
powers of two, and three things can be seen behind them:

* the input of a linear carries exactly such multipliers, channel by channel: it is *scaled*;
* the input of a linear changes in another way: rows are *mixed* there, or went through a curve;
* the model's output changes: something besides linears reads the rows, which is a *leak*.

If linears are scaled and nothing is mixed and nothing leaks, every reader is known, and the rows may be multiplied for good. A
few more passes then tell which row feeds which channel. Each spells one digit, in base 4, of a number that every row of all
modules has, in multipliers 1, 2, 4 and 8; the digits arrive at the channels. All that have different readers are told apart in
the same passes. Fused projections, whose rows are mixed as a whole, are asked once more for parts of their rows
(:mod:`.layouts`).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.discovery.distances import largest_distance, powers_of_two
from quantkit.discovery.layouts import fused_layouts
from quantkit.discovery.places import peers_of
from quantkit.discovery.probe import Probe, Trace
from quantkit.model.modules import weight_of


class Origin(NamedTuple):
    """Where the input channels of a linear come from.

    Attributes:
        module: the linear or norm that writes them.
        rows: ``[K]`` int64, its output row behind each channel.
        power: the channel is multiplied by this power of what its row is multiplied by: 1, or 2 behind a squared ReLU.
    """

    module: str
    rows: Tensor
    power: int

    def same_as(self, other: Origin) -> bool:
        """Whether both are the same rows of the same module, to the same power."""
        return (self.module, self.power) == (other.module, other.power) and torch.equal(self.rows, other.rows)


@dataclass
class Answer:
    """What multiplying the rows of some modules did to the rest of the model.

    Attributes:
        scaled: name of a linear -> ``[K]`` float64, by what each channel of its input was multiplied.
        mixed: names of linears whose input changed in another way.
        leaked: whether an output of the model changed, or there is no output that would show it.
    """

    scaled: dict[str, Tensor]
    mixed: set[str]
    leaked: bool

    @property
    def complete(self) -> bool:
        """Whether all that reads the rows are linears whose inputs are scaled."""
        return bool(self.scaled) and not self.mixed and not self.leaked

    @property
    def only_output(self) -> bool:
        """Whether nothing reads the rows but the model's output."""
        return self.leaked and not self.scaled and not self.mixed


class Writers(NamedTuple):
    """Modules of which is asked which of their rows are behind which channels.

    Attributes:
        peers: their names.
        scaled: name of a linear that reads their rows -> by what each channel of its input was multiplied, ``[K]`` float64.
        rows: the output rows that are told apart; None for all.
    """

    peers: list[str]
    scaled: dict[str, Tensor]
    rows: Tensor | None = None


Known = dict[tuple[Any, ...], Any]
"""What was asked of a trace already, by the tensors that it is about."""


class Prober:
    """Asks the questions of the page above, one model and batch for life.

    Args:
        probe: runs the model.
        reference: a pass of it with nothing changed.
        rows: name of a module -> its number of output rows, for the modules to ask; by default all linears and norms that ran.

    Attributes:
        noise: by how much the model's outputs differ between two passes with nothing changed, see
            :func:`~quantkit.discovery.distances.distance`.
    """

    def __init__(self, probe: Probe, reference: Trace, rows: Mapping[str, int] | None = None) -> None:
        self.probe, self.reference = probe, reference
        self.noise = largest_distance(reference.outputs, probe.run({}).outputs)
        self.random = torch.Generator().manual_seed(0)
        linears = {name: len(weight_of(m)) for name, m in probe.linears.items() if name in reference.inputs}
        self.rows = dict(linears | reference.norm_widths if rows is None else rows)

    def origins(self) -> tuple[dict[str, Origin], set[str]]:
        """Name of a linear -> the origin of its input, where one was found; and the names of linears that are output heads."""
        found: dict[str, Origin] = {}
        heads: set[str] = set()
        writers: list[Writers] = []
        maybe_fused: list[tuple[list[str], set[str]]] = []
        for peers in peers_of(self.probe.model, self.rows):
            answer = self._ask(peers)
            if answer.only_output:
                heads.update(name for name in peers if self._is_head(name))
            if answer.complete:
                writers.append(Writers(peers, answer.scaled))
                # a product of its own rows scales by a square, but has no one row behind a channel; parts of it may
                maybe_fused.append((peers, set(answer.scaled)))
            elif answer.scaled and len(peers) > 1:
                # the leak of one may hide the answers of its peers
                writers.append(Writers(*self._one_by_one(peers, heads)))
            elif answer.mixed and not answer.scaled:
                maybe_fused.append((peers, answer.mixed))
        found.update(self._located(writers))
        for peers, readers in maybe_fused:
            if readers - found.keys() and peers[0] in self.probe.linears:
                found.update(self._locate_part(peers, readers - found.keys()))
        return found, heads

    def _one_by_one(self, peers: Sequence[str], heads: set[str]) -> tuple[list[str], dict[str, Tensor]]:
        """The modules that are complete by themselves, and the inputs that they scale; adds output heads to ``heads``."""
        complete, scaled = [], {}
        for name in peers:
            answer = self._ask([name])
            if answer.complete:
                complete.append(name)
                scaled.update(answer.scaled)
            elif answer.only_output and self._is_head(name):
                heads.add(name)
        return complete, scaled

    def _ask(self, peers: Sequence[str], rows: Tensor | None = None) -> Answer:
        """Multiply the rows of these modules, or only those in ``rows``, by random powers of two."""
        trace = self.probe.run(self._multipliers(peers, rows))
        known = Known()
        factors = {
            name: self._factors(trace, name, known) for name in self.reference.inputs if self._changed(trace, name, known)
        }
        scaled = {name: factor for name, factor in factors.items() if factor is not None}
        return Answer(scaled, factors.keys() - scaled.keys(), self._leaked(trace))

    def _multipliers(self, peers: Sequence[str], rows: Tensor | None) -> dict[str, Tensor]:
        """2 or 8 for every row, whose squares, 4 and 64, have no exponent in common with them modulo 2."""
        multipliers = {}
        for name in peers:
            c = 2.0 ** (
                1 + 2 * torch.randint(0, 2, (self.rows[name],), generator=self.random, dtype=torch.int64, device="cpu").float()
            )
            multipliers[name] = c if rows is None else torch.where(_is_in(rows, len(c)), c, 1.0)
        return multipliers

    def _leaked(self, trace: Trace) -> bool:
        if not self.reference.outputs or not math.isfinite(self.noise):
            return True  # there is nothing that would show a leak
        return largest_distance(self.reference.outputs, trace.outputs) > 10 * self.noise

    def _changed(self, trace: Trace, name: str, known: Known) -> bool:
        before, after = self.reference.inputs[name], trace.inputs.get(name, [])
        key = "changed", *map(id, (*before, *after))
        if key not in known:
            known[key] = len(before) != len(after) or not all(map(torch.equal, before, after))
        return bool(known[key])

    def _factors(self, trace: Trace, name: str, known: Known) -> Tensor | None:
        """By what each input channel of a linear was multiplied, ``[K]`` float64; None if it changed in another way.

        A linear that is called several times has to see the same multipliers in every call. What is ``known`` of ``trace`` is
        added to: several linears may read one tensor.
        """
        key = "factors", *map(id, (*self.reference.inputs[name], *trace.inputs.get(name, [])))
        if key not in known:
            known[key] = self._measured(trace, name)
        return known[key]

    def _measured(self, trace: Trace, name: str) -> Tensor | None:
        before, after = self.reference.inputs[name], trace.inputs.get(name, [])
        if [a.shape for a in before] != [b.shape for b in after]:
            return None
        factors: Tensor | None = None
        for a, b in zip(before, after, strict=True):
            same = torch.equal(a, b)
            factor = torch.ones(a.shape[-1], dtype=torch.float64, device="cpu") if same else powers_of_two(a, b, self.noise)
            if factor is None or (factors is not None and not torch.equal(factors, factor)):
                return None
            factors = factor
        return factors

    def _located(self, writers: Sequence[Writers]) -> dict[str, Origin]:
        """What :meth:`_locate` finds of each by itself; those that have no reader in common are asked together."""
        together: list[list[Writers]] = []
        for one in writers:
            alike = (several for several in together if all(one.scaled.keys().isdisjoint(other.scaled) for other in several))
            if (several := next(alike, None)) is None:
                together.append([one])
            else:
                several.append(one)
        found: dict[int, dict[str, Origin]] = {}
        for several in together:
            origins = self._locate(several)
            for one in several:
                mine = {name: origin for name, origin in origins.items() if name in one.scaled}
                alone = len(several) > 1 and mine.keys() != one.scaled.keys()  # did the others disturb?
                found[id(one)] = self._locate([one]) if alone else mine
        return {name: origin for one in writers for name, origin in found[id(one)].items()}

    def _locate(self, writers: Sequence[Writers]) -> dict[str, Origin]:
        """Which row of which of its peers is behind each channel of the linears that each of ``writers`` scales.

        Rows of all peers are numbered from 1 (and only those in ``rows``, where given, are told apart), and each pass sends one
        digit of these numbers in base 4.
        """
        starts = [list(itertools.accumulate((self.rows[name] for name in one.peers), initial=1)) for one in writers]
        digits = next(d for d in itertools.count(1) if 4**d >= max(ends[-1] for ends in starts))
        factors = {name: factor for one in writers for name, factor in one.scaled.items()}
        powers = {name: 1 if bool((factor.log2().long() % 2).any()) else 2 for name, factor in factors.items()}
        numbers = {name: torch.zeros(len(factor), dtype=torch.long, device="cpu") for name, factor in factors.items()}
        for digit in range(digits):
            multipliers = {}
            for one, ends in zip(writers, starts, strict=True):
                for name, start in zip(one.peers, ends, strict=False):
                    value = torch.arange(start, start + self.rows[name], dtype=torch.int64, device="cpu") // 4**digit % 4
                    if one.rows is not None:
                        value = torch.where(_is_in(one.rows, len(value)), value, 0)
                    multipliers[name] = 2.0 ** value.float()
            trace, known = self.probe.run(multipliers), Known()
            for name in list(numbers):
                factor = self._factors(trace, name, known)
                if factor is None:
                    del numbers[name]
                else:
                    numbers[name] += factor.log2().long() // powers[name] * 4**digit
        found = {}
        for one, ends in zip(writers, starts, strict=True):
            for name in one.scaled.keys() & numbers.keys():
                number = numbers[name]
                at = bisect.bisect_right(ends, int(number.min())) - 1  # the member whose rows have such numbers
                if 0 <= at < len(one.peers) and int(number.max()) < ends[at + 1]:
                    found[name] = Origin(one.peers[at], number - ends[at], powers[name])
        return self._confirmed(writers, found)

    def _confirmed(self, writers: Sequence[Writers], found: dict[str, Origin]) -> dict[str, Origin]:
        """Those origins that predict the outcome of one more pass: digits of several rows may add up to a number as well."""
        if not found:
            return {}
        multipliers: dict[str, Tensor] = {}
        for one in writers:
            multipliers.update(self._multipliers(one.peers, one.rows))
        trace, known, confirmed = self.probe.run(multipliers), Known(), {}
        for name, origin in found.items():
            seen, predicted = (
                self._factors(trace, name, known),
                multipliers[origin.module][origin.rows].double() ** origin.power,
            )
            if seen is not None and torch.equal(seen, predicted):
                confirmed[name] = origin
        return confirmed

    def _locate_part(self, peers: list[str], readers: set[str]) -> dict[str, Origin]:
        """The origins of ``readers`` in fused projections, by trying one layout of their rows after another.

        A layout is right if multiplying its part of the rows scales some linear in every channel, and does nothing else.
        """
        channels = {self.reference.inputs[name][0].shape[-1] for name in readers}
        if len(channels) != 1 or len({self.rows[name] for name in peers}) != 1:
            return {}
        for rows in fused_layouts(self.rows[peers[0]], channels.pop()):
            answer = self._ask(peers, rows)
            if answer.complete and all(bool((factor > 1).all()) for factor in answer.scaled.values()):
                return self._locate([Writers(peers, answer.scaled, rows)])
        return {}

    def _is_head(self, name: str) -> bool:
        """Whether an output of the model depends on this linear alone: with its output zero, all tokens get the same there.

        Tokens are compared, and not channels, because single channels may be masked or biased behind the head.
        """
        trace = self.probe.run({name: torch.zeros(self.rows[name], dtype=torch.float32, device="cpu")})
        for before, after in zip(self.reference.outputs, trace.outputs, strict=True):
            tokens = after.reshape(-1, after.shape[-1]) if after.dim() else after.reshape(1, 1)
            constant = tokens[:1] if len(tokens) > 1 else tokens[:1, :1]
            if not torch.equal(before, after) and bool((tokens == constant).all()):
                return True
        return False


def _is_in(rows: Tensor, n: int) -> Tensor:
    """``[n]`` bool, true at ``rows``."""
    mask = torch.zeros(n, dtype=torch.bool, device="cpu")
    mask[rows] = True
    return mask
