"""GPTQ (Frantar et al. 2023): round a weight column by column, and let the later columns make up for the error of the earlier.

What matters is the output ``W x`` and not the weight. If two channels of x usually rise and fall together, the rounding error
of one column of W can be cancelled by a change to the other column. Which channels do is in the second moment ``H = sum of x
x^T`` over the calibration data. After a column is rounded, the columns that are still to come are changed by that combination
which, by H, makes the expected error of the output least; at the end all are rounded.

The file holds the statistic (:class:`Hessian`), the calibrator (:class:`GPTQ`), and the two steps of its linear algebra:
:func:`inverse_factor` turns H into the coefficients of the changes, and :func:`round_columns` rounds with them.
"""

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
from quantkit.core.formats import PerTensor, Quantized
from quantkit.core.groups import group_scales
from quantkit.core.numerics import decode, encode
from quantkit.core.scheme import Scheme
from quantkit.core.transform import Transform
from quantkit.core.weights import grid_of, round_weight
from quantkit.ops.reference import quantize_rows

BLOCK = 128
"""So many columns are rounded before the columns behind them are changed, all at once in one matrix product."""

HELD = 7
"""Every seventh token is held out. Seven divides no usual length of a text, so that tokens from all positions are held out."""


class Hessian:
    """The second moment of a site's activation, and a sample of held-out tokens by which a result can be judged.

    Every seventh token is held out: it is not in the moment.

    Attributes:
        moment: ``[K, K]`` float32, the sum of ``x x^T`` over tokens; it takes 4 K^2 bytes for each site.
        total: ``[K]`` float64, the sum of x over the same tokens, which is needed to apply a shift afterwards.
        count: the number of these tokens.
        seen: the number of all tokens, with those held out.
        held: a sample of the tokens that were held out.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.moment = torch.zeros(channels, channels, device=device, dtype=torch.float32)
        # In float32 on mps, which has no float64.
        self.total = torch.zeros(channels, dtype=torch.float64 if self.moment.device.type != "mps" else None, device=device)
        self.count = self.seen = 0
        self.held = TokenSample(channels, device, seed)

    def update(self, x: Tensor) -> None:
        held = (torch.arange(self.seen, self.seen + len(x), device=x.device, dtype=torch.int64) % HELD) == HELD - 1
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
        if transform.shift is not None:  # the sum of (x - d)(x - d)^T; in float64, since large terms may nearly cancel
            shift = transform.shift.to(total)
            cross = torch.outer(shift, total)
            moment = (moment.to(total.dtype) - cross - cross.T + self.count * torch.outer(shift, shift)).float()
            total = total - self.count * shift
        linear = transform.without("shift")
        moment = linear.activation(linear.activation(moment)[0].T)[0]
        return self._with(moment, linear.activation(total)[0], self.count, self.held.after(transform))

    def _with(self, moment: Tensor, total: Tensor, count: int, held: TokenSample) -> Hessian:
        out = object.__new__(Hessian)  # __init__ would fill K^2 zeros, only to throw them away
        out.moment, out.total, out.count, out.held, out.seen = moment, total, count, held, count + held.seen
        return out

    def tensors(self) -> dict[str, Tensor]:
        held = {f"held_{name}": tensor for name, tensor in self.held.tensors().items()}
        return {
            "moment": self.moment,
            "total": self.total,
            "count": torch.tensor(self.count, dtype=torch.int64, device="cpu"),
            **held,
        }


@dataclass(frozen=True)
class GPTQ:
    """Chooses the codes of each weight so that the output of the linear, and not the weight itself, changes as little as
    possible.

    Columns are rounded one by one, beginning with those whose input is largest, and the error of each is made up for by the
    columns that follow (paper, algorithm 1). All linears of a site share one second moment. The codes are stored in the
    original order of columns, so nothing is reordered at run time.

    For each linear the result is then compared with rounding to nearest, by the output error on tokens that were held out, with
    activations rounded as the scheme rounds them. The better of the two is kept, and the report says where that is rounding to
    nearest. A site whose second moment cannot be inverted with any damping is rounded to nearest as well.

    Args:
        damping: added to the diagonal of the second moment, as a fraction of its mean, so that it can be inverted. Where this
            is not enough it is raised tenfold, up to 1.
        clip: whether the grid of a row may end below its largest weight, down to a half of it, where that lowers the error
            predicted from the diagonal of the second moment. Grids that an earlier calibrator chose are always kept.

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
        """The codes of the linears for which they are better than rounding to nearest, and notes for the report."""
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
        ratios, kept = [], []
        for name, weight in site.weights():
            own, channels = site.weight_format, weight.shape[1]
            nearest = Codes(*round_weight(weight, own, clip=site.clips.get(name)))
            groups = own.groups(channels) or (channels,)
            parts = zip(weight.split(groups, 1), moment.diagonal().split(groups), strict=True)
            absmax = torch.cat([self._grid(site, name, *part) for part in parts], 1)
            found = round_columns(weight, absmax, factor, order, own)
            wanted = tokens @ weight.T
            before, after = (
                float(counts @ (rounded @ decode(c.codes, of_columns(c.scale, own, channels)).T - wanted).pow(2).sum(1))
                for c in (nearest, found)
            )
            if after < before:
                codes[name] = found
                ratios.append(after / before)
            else:
                kept.append(name.rpartition(".")[2])  # without an entry in codes, the pipeline rounds it to nearest
        notes: dict[str, Any] = {}
        if ratios:
            notes["gptq error"] = math.prod(ratios) ** (1 / len(ratios))
        if damping > self.damping:
            notes["gptq damping"] = damping
        if kept:
            notes["gptq"] = f"no better on held-out tokens, rounded to nearest: {', '.join(kept)}"
        return codes, notes

    def _grid(self, site: SiteView, name: str, weight: Tensor, diagonal: Tensor) -> Tensor:
        """Where the grid of each row ends, ``[N, 1]``.

        Args:
            site: for its scheme, and the grids that earlier calibrators chose.
            name: of the linear.
            weight: ``[N, K]``, the columns of one group of channels, or all columns.
            diagonal: ``[K]``, the same part of the diagonal of the second moment.
        """
        whole = weight.abs().amax(1, keepdim=True)
        if isinstance(site.scheme.weight.granularity, PerTensor):
            whole = whole.amax().expand_as(whole)
        if name in site.clips:
            return whole * site.clips[name]
        if not self.clip:
            return whole
        return whole * best_clip(weight, diagonal, site.scheme)


def as_rounded(x: Tensor, scheme: Scheme) -> Tensor:
    """``x [T, K]`` as the product will see it.

    With a dynamic scheme each token is rounded. With a static scheme x is returned as it is, because the range is not known
    yet, and also where activations stay in floating point.
    """
    if scheme.is_static or not isinstance(scheme.input, Quantized):
        return x
    codes, scale, zero = quantize_rows(x, bits=scheme.input.number.bits, symmetric=scheme.input.number.symmetric)
    return decode(codes, scale, 0 if zero is None else zero)


def dampings(least: float) -> Iterator[float]:
    """The dampings to be tried: ``least``, and ten times more each time, up to 1."""
    while least < 1:
        yield least
        least *= 10
    yield 1.0


def inverse_factor(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """The upper Cholesky factor of the inverse of a second moment, from which :func:`round_columns` takes its coefficients.

    It is computed in float64. With a damping of 1 % the condition number may reach 100 K, too much for two inversions in
    float32.

    Args:
        moment: ``[K, K]`` float32.
        order: ``[K]`` int64, the order in which columns will be rounded.
        damping: the least fraction of the mean diagonal to add to the diagonal.

    Returns:
        The factor ``[K, K]`` float32, with rows and columns in ``order``, and the damping with which it was found; or None and
        1.0 if the moment is not finite, or no damping up to 1 makes it invertible.
    """
    double = moment.dtype if moment.device.type == "mps" else torch.float64
    diagonal = moment.diagonal().to(double)
    if not bool(moment.isfinite().all()):
        return None, 1.0
    mean = float(diagonal.mean())
    for damp in dampings(damping):
        h = moment[order][:, order].to(double)
        # A channel that was always 0 has a row of zeros. Any positive number on the diagonal makes it invertible, and changes
        # nothing for the others.
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
    """``values [N, G]``, one for each group of columns, repeated for each column: ``[N, K]``. ``groups`` are the sizes."""
    return values.repeat_interleave(torch.tensor(groups, device=values.device, dtype=torch.int64), dim=1)


def of_columns(scale: Tensor, own: Quantized, channels: int) -> Tensor:
    """The scale of each row in each column, ``[N, K]``, from what :func:`quantkit.core.weights.round_weight` gives."""
    groups = own.groups(channels)
    return spread(group_scales(scale), groups) if groups else scale.expand(-1, channels)


def round_columns(weight: Tensor, absmax: Tensor, factor: Tensor, order: Tensor, own: Quantized) -> Codes:
    """Round the columns of a weight in ``order``, and change the later columns to make up for the error of each.

    Args:
        weight: ``[N, K]`` float32.
        absmax: ``[N, G]`` float32, where the grid of each row ends in each group of columns.
        factor: ``[K, K]``, from :func:`inverse_factor` with the same order.
        order: ``[K]`` int64, the order in which columns are rounded.
        own: the number format of the weight.
    """
    rows, channels = weight.shape
    grid, scale = grid_of(absmax, own, channels)
    bits, grids = own.number.bits, spread(grid, own.groups(channels) or (channels,))
    scales = of_columns(scale, own, channels)
    left = weight[:, order].T.contiguous()  # [K, N]: a column at a time is a row of memory
    codes = torch.empty(channels, rows, dtype=torch.int8, device=weight.device)
    for first in range(0, channels, BLOCK):
        last = min(first + BLOCK, channels)
        errors = torch.empty(last - first, rows, device=weight.device, dtype=torch.float32)
        for i in range(first, last):
            j = order[i]
            codes[i] = encode(left[i], grids[:, j], bits)
            errors[i - first] = (left[i] - decode(codes[i], scales[:, j])) / factor[i, i]
            left[i + 1 : last].addr_(factor[i, i + 1 : last], errors[i - first], alpha=-1)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return Codes(natural.T.contiguous(), scale)
