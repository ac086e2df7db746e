"""Equivalence, measured against the run-to-run noise of the model itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import EquivalenceError
from quantkit.core.sites import Site
from quantkit.model.modules import call, evaluating, first_input, tensors_in


@dataclass(frozen=True)
class Equivalence:
    """How far two models are apart on one batch.

    Attributes:
        error: RMS of the difference over RMS of the reference, the worst over all output tensors.
        noise: the same between two runs of the reference.
        tolerance: what is allowed.
    """

    error: float
    noise: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "equivalent" if self.holds else "NOT equivalent"
        return f"{verdict}: relative error {self.error:.2e}, allowed {self.tolerance:.1e}, noise floor {self.noise:.1e}"


def outputs_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating outputs of the model on ``batch``, in eval mode, detached."""
    with evaluating(model):
        return [t.detach().clone() for t in tensors_in(call(model, batch))]


def relative_error(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Worst RMS error over RMS signal among matching tensors; ``inf`` where shapes differ or something became infinite.

    Infinities that agree, such as masked logits, count as equal; not-a-numbers prove nothing and never agree.
    """
    if len(reference) != len(other) or any(a.shape != b.shape for a, b in zip(reference, other, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        a, b = a.double(), b.double()
        difference, signal = torch.where(a == b, 0.0, a - b), torch.where(a.isinf(), 0.0, a)
        error = float(difference.pow(2).mean().sqrt() / signal.pow(2).mean().sqrt().clamp_min(1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def tolerance_for(outputs: Sequence[Tensor], noise: float, model: nn.Module | None = None) -> float:
    """1e-5, or eight times the epsilon of a shorter format, or ten times the noise floor.

    The shortest format counts, be it of an output or of a parameter of ``model``: float32 logits of a bfloat16 model are
    no better than its weights.
    """
    weights = () if model is None else (p for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
    eps = max((torch.finfo(t.dtype).eps for t in (*outputs, *weights)), default=0.0)
    return max(1e-5, 8 * eps, 10 * noise)


def verify_equivalence(
    model: nn.Module, reference: nn.Module | Sequence[Tensor], batch: Any, *, tolerance: float | None = None
) -> Equivalence:
    """Compare ``model`` with ``reference`` on ``batch``.

    Args:
        model: the model to check.
        reference: the original model, or the list of its output tensors on the same batch.
        batch: a tensor, dict of keyword arguments or tuple of arguments.
        tolerance: allowed relative RMS error; by default 1e-5 for float32 (scaled by the epsilon of shorter
            formats), and never below ten times the difference between two runs of the reference.

    Returns:
        An :class:`Equivalence`; its ``holds`` says whether the models agree. Models that differ raise nothing.

    Raises:
        EquivalenceError: the reference returns no floating-point tensor.
    """
    if isinstance(reference, nn.Module):
        wanted = outputs_of(reference, batch)
        noise = relative_error(wanted, outputs_of(reference, batch))
    else:
        wanted = list(reference)
        noise = 0.0
    if not wanted:
        raise EquivalenceError("the reference returns no floating-point tensor, so there is nothing to compare")
    error = relative_error(wanted, outputs_of(model, batch))
    return Equivalence(error, noise, tolerance_for(wanted, noise, model) if tolerance is None else tolerance)


def rehearse(model: nn.Module, batch: Any, sites: Sequence[Site], shifts: Mapping[str, Tensor] | None = None) -> set[str]:
    """Names of sites whose fold would change the model, by playing all folds through hooks.

    Scales are powers of two, which commute with every rounding, so the outputs must agree to the noise floor in any dtype,
    before one weight is touched. If they do not, the sites are halved until the culprits stand alone. ``shifts`` of producer
    rows, by site, are played instead of scales, and have to agree to the rounding of the model's dtype.
    """
    if not sites:
        return set()
    wanted = outputs_of(model, batch)
    noise = relative_error(wanted, outputs_of(model, batch))
    if not math.isfinite(noise):
        return {site.name for site in sites}  # two runs have nothing in common, so nothing can be shown
    tolerance = tolerance_for(wanted, noise, None if shifts is None else model)

    random = torch.Generator().manual_seed(2)

    def play(site: Site) -> Played:
        return _rehearsal(site, random) if shifts is None else _shifted(site, shifts[site.name])

    def culprits(some: Sequence[Site]) -> set[str]:
        if not some:
            return set()
        with folded_by_hooks(model, [play(site) for site in some]):
            if relative_error(wanted, outputs_of(model, batch)) <= tolerance:
                return set()
        if len(some) == 1:
            return {some[0].name}
        middle = len(some) // 2
        bad = culprits(some[:middle]) | culprits(some[middle:])
        return bad or {site.name for site in some}  # they only fail together: none is safe

    return culprits(sites)


Played = tuple[Site, tuple[Tensor, Tensor] | None, Tensor, Tensor]
"""A site, the factor and shift of its producer's first rows, and what its channels are multiplied by and increased by."""


def _rehearsal(site: Site, random: torch.Generator) -> Played:
    assert site.producer is not None
    rows = site.producer.rows
    c = torch.ones(int(rows.max()) + 1)
    c[rows] = torch.exp2(torch.randint(-2, 3, (len(c),), generator=random).float())[rows]
    return site, (c, torch.zeros_like(c)), c[rows] ** -site.producer.power, torch.zeros(len(rows))


def _shifted(site: Site, d: Tensor) -> Played:
    assert site.producer is not None
    rows = site.producer.rows
    return site, (torch.ones_like(d), d), torch.ones(len(rows)), d[rows]


def arriving_shifts(model: nn.Module, batch: Any, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Sites where a shift of the producer's rows arrives at all linears as it left, and the shift that was tried.

    It is as large as its channel, of either sign, so a curve or a product in between shows at once; outputs alone may hide it.
    """
    if not sites:
        return {}
    random, plain = torch.Generator().manual_seed(4), _inputs(model, batch, sites, [])
    shifts = {}
    for site in sites:
        assert site.producer is not None
        rows = site.producer.rows
        size = torch.zeros(int(rows.max()) + 1)
        for x in plain[site.name]:
            size.scatter_reduce_(0, rows, _largest(x).cpu(), "amax")
        sign = 2.0 * torch.randint(0, 2, (len(size),), generator=random) - 1
        shifts[site.name] = (1 + torch.rand(len(size), generator=random)) * sign * size
    again = _inputs(model, batch, sites, [_shifted(site, shifts[site.name]) for site in sites])

    def arrives(site: Site) -> bool:
        assert site.producer is not None
        d, before, after = shifts[site.name][site.producer.rows], plain[site.name], again[site.name]
        return bool(before) and len(before) == len(after) and all(map(_moved_by, before, after, itertools.repeat(d)))

    return {site.name: shifts[site.name] for site in sites if arrives(site)}


def _moved_by(before: Tensor, after: Tensor, d: Tensor) -> bool:
    """Whether ``after`` is ``before - d`` in every channel, to a few roundings of the largest value there."""
    if before.shape != after.shape:
        return False
    d, slack = d.to(before.device), 16 * max(torch.finfo(before.dtype).eps, 1e-6)
    return bool((_largest(after.double() - (before.double() - d)) <= slack * (_largest(before) + d.abs())).all())


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value in each channel of ``x [..., K]``, ``[K]`` float32; 0 without tokens."""
    rows = x.reshape(-1, x.shape[-1]).abs().float()
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).amax(0)


def _inputs(model: nn.Module, batch: Any, sites: Sequence[Site], played: Sequence[Played]) -> dict[str, list[Tensor]]:
    """What all linears of each site read, ahead of the hooks that undo what is ``played``."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    with ExitStack() as stack:
        for site in sites:
            for name in site.linears:

                def note(_: nn.Module, args: Any, kwargs: Any, seen: list[Tensor] = seen[site.name]) -> None:
                    seen.append(first_input(args, kwargs).detach().clone())

                hook = model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
        stack.enter_context(folded_by_hooks(model, played))
        outputs_of(model, batch)
    return seen


@contextmanager
def folded_by_hooks(model: nn.Module, played: Sequence[Played]) -> Iterator[None]:
    """Inside, for each ``(site, (factor, shift), scale, more)``, the first rows of the producer's output are ``(y - shift) *
    factor``, and the input of every consumer is ``x * scale + more``, all through hooks."""
    with ExitStack() as stack:
        for site, rows, scale, more in played:
            if rows is not None:
                assert site.producer is not None
                producer = model.get_submodule(site.producer.module)
                stack.callback(producer.register_forward_hook(_change_output(*rows)).remove)
            for name in site.linears:
                hook = model.get_submodule(name).register_forward_pre_hook(_change_input(scale, more), with_kwargs=True)
                stack.callback(hook.remove)
        yield


@contextmanager
def reordered_by_hooks(model: nn.Module, orders: Sequence[tuple[Sequence[str], Tensor, dict[str, Tensor]]]) -> Iterator[None]:
    """Inside, for each ``(readers, inverse, sources)``, each linear in ``sources`` puts out the rows named there first, and the
    input of every reader is indexed with ``inverse``; the former behind other hooks, the latter ahead of them."""
    with ExitStack() as stack:
        for readers, inverse, sources in orders:
            for name, source in sources.items():
                stack.callback(model.get_submodule(name).register_forward_hook(_reorder_output(source)).remove)
            for name in readers:
                linear = model.get_submodule(name)
                hook = linear.register_forward_pre_hook(_reorder_input(inverse), with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
        yield


def _reorder_output(source: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        whole = torch.arange(output.shape[-1], device=output.device)
        whole[: len(source)] = source.to(output.device)
        return output[..., whole]

    return hook


def _reorder_input(order: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs)
        return (x[..., order.to(x.device)], *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    return hook


def _change_output(factor: Tensor, shift: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        n = output.shape[-1] - len(factor)
        whole, less = torch.cat([factor, factor.new_ones(n)]), torch.cat([shift, shift.new_zeros(n)])
        precise = output.to(torch.promote_types(output.dtype, torch.float32))  # shifts may cancel: one rounding is enough
        return ((precise - less.to(precise)) * whole.to(precise)).to(output.dtype)

    return hook


def _change_input(factor: Tensor, more: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (precise * factor.to(precise) + more.to(precise)).to(x.dtype)
        return (x, *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    return hook
