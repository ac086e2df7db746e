"""GPTQ (Frantar et al. 2023): round column by column, and let the columns to come make up for the error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantkit.calibration.statistics import Statistic, TokenSample
from quantkit.calibrators.base import Codes, Plan, SiteView, Stage, View
from quantkit.calibrators.noise import best_clip
from quantkit.core.errors import MethodError
from quantkit.core.numerics import decode, encode, of_clusters, quantize_weight, steps_of, weight_grid
from quantkit.core.scheme import Scheme
from quantkit.core.transform import Transform
from quantkit.ops.reference import quantize_rows

BLOCK = 128
"""Columns that are rounded before the rest of the weight hears of their errors."""

HELD = 7
"""Every seventh token is held out: a stride that no usual length of a text divides, so first tokens are among them too."""


class Hessian:
    """Second moment of a site's activation, with a sample of tokens that are left out of it to judge by.

    Attributes:
        moment: ``[K, K]`` float32, the sum of ``x x^T``; 4 K^2 bytes for each site.
        total: ``[K]`` float64, the sum of x, without which a shift could not be applied; ``count`` is the number of tokens.
        held: of the tokens that are held out.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.moment = torch.zeros(channels, channels, device=device)
        # Not every device knows float64.
        self.total = torch.zeros(channels, dtype=torch.float64 if self.moment.device.type != "mps" else None, device=device)
        self.count = self.seen = 0
        self.held = TokenSample(channels, device, seed)

    def update(self, x: Tensor) -> None:
        held = (torch.arange(self.seen, self.seen + len(x), device=x.device) % HELD) == HELD - 1
        self.seen += len(x)
        if bool(held.any()):
            self.held.update(x[held])
        x = x[~held].float()
        self.moment.addmm_(x.T, x)
        self.total += x.sum(0, dtype=self.total.dtype)
        self.count += len(x)

    def merge(self, other: Hessian) -> Hessian:
        return self._with(
            self.moment + other.moment, self.total + other.total, self.count + other.count, self.held.merge(other.held)
        )

    def after(self, transform: Transform) -> Hessian:
        moment, total = self.moment, self.total
        if transform.shift is not None:  # the sum of (x - d)(x - d)^T, in float64 since it may nearly cancel
            shift = transform.shift.to(total)
            cross = torch.outer(shift, total)
            moment = (moment.to(total.dtype) - cross - cross.T + self.count * torch.outer(shift, shift)).float()
            total = total - self.count * shift
        linear = transform.without("shift")
        moment = linear.activation(linear.activation(moment)[0].T)[0]
        return self._with(moment, linear.activation(total)[0], self.count, self.held.after(transform))

    def _with(self, moment: Tensor, total: Tensor, count: int, held: TokenSample) -> Hessian:
        out = object.__new__(Hessian)  # K^2 zeros for nothing would cost as much as the answer
        out.moment, out.total, out.count, out.held, out.seen = moment, total, count, held, count + held.seen
        return out

    def tensors(self) -> dict[str, Tensor]:
        held = {f"held_{name}": tensor for name, tensor in self.held.tensors().items()}
        return {"moment": self.moment, "total": self.total, "count": torch.tensor(self.count), **held}


@dataclass(frozen=True)
class GPTQ:
    """Integers that keep the output of each linear, not each weight, as near as they can.

    Columns are rounded one by one, those with the largest activation first; what is lost in one is made up for by the columns
    that follow, in the measure of the activation's second moment (paper, algorithm 1). All linears of a site share the moment.
    The codes are stored in the natural order, so nothing is reordered at run time.

    Each linear then compares its output error on tokens that were held out, with activations rounded as the scheme rounds them,
    with that of round to nearest, and keeps the better of the two; the report says which. So it does where no damping makes
    the moment invertible.

    Args:
        damping: share of the mean diagonal that is added to the diagonal. Raised tenfold, up to 1, as long as the moment cannot
            be inverted.
        clip: each row may choose a smaller grid than its largest weight asks for (down to a half) if that lowers the error
            predicted from the diagonal; grids that an earlier calibrator has learned are taken as they are.

    Raises:
        MethodError: damping is no number above 0 and up to 1, or clip no bool.
    """

    name: ClassVar[str] = "gptq"
    stage: ClassVar[Stage] = Stage.ROUND
    statistics: ClassVar[tuple[type[Statistic], ...]] = (Hessian,)

    damping: float = 0.01
    clip: bool = True

    def __post_init__(self) -> None:
        damping = self.damping
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping <= 1:
            raise MethodError(f"GPTQ(damping={damping!r}): damping is a share of the mean diagonal, above 0 and up to 1")
        if not isinstance(self.clip, bool):
            raise MethodError(f"GPTQ(clip={self.clip!r}): clip is True or False")

    def plan(self, view: View) -> Plan:
        plan = Plan()
        for site in view.progress(view.sites, self.name):
            with torch.no_grad():
                codes, plan.notes[site.name] = self.plan_site(site)
                plan.codes.update(codes)
        return plan

    def plan_site(self, site: SiteView) -> tuple[dict[str, Codes], dict[str, Any]]:
        """The codes of those linears that gain by it, and notes for the report."""
        seen = site.statistic(Hessian)
        if not seen.held.seen:
            return {}, {"gptq": f"no: fewer than {HELD} tokens reached it, so none is held out"}
        tokens, counts = seen.held.weighted()
        rounded = as_rounded(tokens, site.scheme)
        noise = counts @ (rounded - tokens) ** 2 * (seen.count / counts.sum())
        moment = seen.moment + torch.diag(noise)  # of the activation as the product will see it
        order = moment.diagonal().argsort(descending=True, stable=True)
        factor, damping = inverse_factor(moment, order, self.damping)
        if factor is None:
            return {}, {"gptq": "no: the second moment cannot be inverted, rounded to nearest"}
        codes: dict[str, Codes] = {}
        shares, kept = [], []
        for name, weight in site.weights():
            per_tensor, learned = site.scheme.weights == "tensor", site.clips.get(name)
            bits, groups = site.scheme.weight_bits, site.transform.groups or (weight.shape[1],)
            nearest = Codes(*quantize_weight(weight, bits, per_tensor=per_tensor, groups=groups, clip=learned))
            parts = zip(weight.split(groups, 1), moment.diagonal().split(groups), strict=True)
            absmax = torch.cat([self._grid(site, name, *part) for part in parts], 1)
            found = round_columns(weight, absmax, factor, order, bits, groups)
            wanted = tokens @ weight.T
            before, after = (
                float(counts @ (rounded @ decode(c.codes, spread(of_clusters(c.scale), groups)).T - wanted).pow(2).sum(1))
                for c in (nearest, found)
            )
            if after < before:
                codes[name] = found
                shares.append(after / before)
            else:
                kept.append(name.rpartition(".")[2])  # the pipeline rounds it as ``nearest`` is
        notes: dict[str, Any] = {}
        if shares:
            notes["gptq error"] = math.prod(shares) ** (1 / len(shares))
        if damping > self.damping:
            notes["gptq damping"] = damping
        if kept:
            notes["gptq"] = f"no better on held-out tokens, rounded to nearest: {', '.join(kept)}"
        return codes, notes

    def _grid(self, site: SiteView, name: str, weight: Tensor, diagonal: Tensor) -> Tensor:
        """Largest value ``[N, 1]`` of the grid of each row, or of its part in one cluster."""
        whole = weight.abs().amax(1, keepdim=True)
        if site.scheme.weights == "tensor":
            whole = whole.amax().expand_as(whole)
        if name in site.clips:
            return whole * site.clips[name]
        if not self.clip:
            return whole
        return whole * best_clip(weight, diagonal, site.scheme)


def as_rounded(x: Tensor, scheme: Scheme) -> Tensor:
    """``x [T, K]`` after the rounding of a dynamic scheme; as it is for a static one, whose range is not known here, and where
    activations stay in floating point."""
    if scheme.is_static or not scheme.quantizes_activations:
        return x
    codes, scale, zero = quantize_rows(x, bits=scheme.activation_bits, symmetric=scheme.symmetric)
    return decode(codes, scale, 0 if zero is None else zero)


def dampings(least: float) -> Iterator[float]:
    """``least`` and tenfold more each time, up to 1."""
    while least < 1:
        yield least
        least *= 10
    yield 1.0


def inverse_factor(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """Upper Cholesky factor ``[K, K]`` float32 of the inverse of ``moment``, with rows and columns in ``order``.

    Computed in float64: with a damping of 1 % the condition may reach 100 K, too much for two inversions in float32.

    Returns:
        The factor, or None if no damping helps, and the damping that did.
    """
    double = moment.dtype if moment.device.type == "mps" else torch.float64
    diagonal = moment.diagonal().to(double)
    if not bool(moment.isfinite().all()):
        return None, 1.0
    mean = float(diagonal.mean())
    for damp in dampings(damping):
        h = moment[order][:, order].to(double)
        # A channel that never fired has no say: on the diagonal any positive number leaves the others alone.
        h.diagonal().add_(damp * mean).masked_fill_(diagonal[order] <= 0, mean or 1.0)
        lower, failed = torch.linalg.cholesky_ex(h)
        if int(failed):
            continue
        torch.cholesky_inverse(lower, out=h)
        upper, failed = torch.linalg.cholesky_ex(h, upper=True)
        if not int(failed) and bool(upper.isfinite().all()):
            return upper.float(), damp
    return None, 1.0


def spread(values: Tensor, groups: tuple[int, ...]) -> Tensor:
    """``[N, G]`` of clusters, whose sizes are ``groups``, for each of their columns, ``[N, K]``."""
    return values.repeat_interleave(torch.tensor(groups, device=values.device), dim=1)


def round_columns(weight: Tensor, absmax: Tensor, factor: Tensor, order: Tensor, bits: int, groups: tuple[int, ...]) -> Codes:
    """Codes of ``weight [N, K]`` on the grid of ``absmax``, each column's error spread over those that follow in ``order``.

    Args:
        weight: ``[N, K]`` float32.
        absmax: ``[N, G]`` float32, the largest value of each row's grid in each cluster of columns.
        factor: from :func:`inverse_factor`, in the same order.
        order: ``[K]`` int64, the columns as they are rounded.
        bits: of the codes.
        groups: sizes of the G clusters; K for one of all columns.
    """
    rows, channels = weight.shape
    grid, scale = weight_grid(absmax, bits, steps_of(channels, bits))
    grids, scales = spread(grid, groups), spread(of_clusters(scale), groups)
    left = weight[:, order].T.contiguous()  # [K, N]: a column at a time is a row of memory
    codes = torch.empty(channels, rows, dtype=torch.int8, device=weight.device)
    for first in range(0, channels, BLOCK):
        last = min(first + BLOCK, channels)
        errors = torch.empty(last - first, rows, device=weight.device)
        for i in range(first, last):
            j = order[i]
            codes[i] = encode(left[i], grids[:, j], bits)
            errors[i - first] = (left[i] - decode(codes[i], scales[:, j])) / factor[i, i]
            left[i + 1 : last].addr_(factor[i, i + 1 : last], errors[i - first], alpha=-1)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return Codes(natural.T.contiguous(), scale)
