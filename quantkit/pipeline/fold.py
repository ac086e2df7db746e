"""Folding: a site's scale and shift go into the module that produces it, its order of channels into the linears that carry it.

What of a transform can be folded is a value here, :class:`Fold` and :class:`Reorder`, and what cannot is the transform that is
left for run time. Only :func:`store_norms` changes a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantkit.core.plan import ModelPlan
from quantkit.core.sites import Site, absorb
from quantkit.core.transform import Transform


class Rows(NamedTuple):
    """The first n output rows of a linear become ``(y - shift) * factor``, both ``[n]`` float32."""

    factor: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Fold:
    """What a producer takes over.

    Attributes:
        site: whose channels.
        parameters: new values of a norm's parameters, in their own dtype.
        rows: of a linear producer.
        scale, shift: ``[K]`` float32, the parts that consumers must undo: ``x_new = (x - shift) / scale`` exactly.
    """

    site: Site
    parameters: dict[str, Tensor]
    rows: Rows | None
    scale: Tensor
    shift: Tensor


def split(model: nn.Module, site: Site, transform: Transform) -> tuple[Fold | None, Transform]:
    """The part of ``transform`` that the site's producer absorbs, and the part that must run at inference.

    ``fold.scale`` and ``fold.shift`` are computed back from the parameters as they are stored, so a bfloat16 norm weight adds
    no error. Channels whose new parameter would under- or overflow its dtype keep their scale at run time.
    """
    producer, scale = site.producer, transform.scale
    shift = None if producer is None or producer.bias is None else transform.shift
    one = shift if scale is None else scale
    if producer is None or one is None:
        return None, transform
    rows = producer.rows.to(one.device)
    wanted = torch.ones(_width(model, site), dtype=torch.float32, device=one.device)
    row_shift = torch.zeros_like(wanted)
    if scale is not None:
        wanted.scatter_reduce_(0, rows, site.tie(scale), "amax", include_self=False)
    if shift is not None:
        row_shift.scatter_reduce_(0, rows, shift, "mean", include_self=False)
    factor = wanted ** (-1.0 / producer.power)
    parameters: dict[str, Tensor] = {}
    if producer.kind == "norm":
        module = model.get_submodule(producer.module)
        for name, rule in producer.parameters.items():
            old = module.get_parameter(name).detach()
            new = absorb(old.float(), factor, rule).to(old.dtype)
            if not parameters:  # the gain comes first; what it stores is the factor from here on
                factor = _stored_factor(old.float(), new.float(), factor, rule, torch.finfo(old.dtype).tiny)
                new = absorb(old.float(), factor, rule).to(old.dtype)
            parameters[name] = new
        if shift is not None:
            assert producer.bias is not None
            old = module.get_parameter(producer.bias).detach()
            stored = absorb(old.float() - row_shift, factor, producer.parameters[producer.bias]).to(old.dtype)
            parameters[producer.bias] = stored
            row_shift = old.float() - stored.float() / factor
    folded = factor[rows] ** -producer.power
    leftover = transform
    if scale is not None:
        left = torch.where((folded / scale - 1).abs() < 0.01, torch.ones_like(scale), scale / folded)
        leftover = replace(leftover, scale=None if bool((left == 1).all()) else left)
    if shift is not None:
        leftover = replace(leftover, shift=None)
    elif transform.shift is not None:  # what arrives is divided by the folded scale already
        leftover = replace(leftover, shift=transform.shift / folded)
    changed = Rows(factor, row_shift) if producer.kind == "linear" else None
    return Fold(site, parameters, changed, folded, row_shift[rows]), leftover


def _stored_factor(old: Tensor, new: Tensor, factor: Tensor, rule: str, tiny: float) -> Tensor:
    offset = 1.0 if rule == "offset" else 0.0
    before, after = old + offset, new + offset
    stored = torch.where(before == 0, factor, after / before)
    ok = torch.isfinite(new) & ((new.abs() >= tiny) | (before == 0) | (rule == "offset")) & (stored > 0)
    # An offset norm may round 1 + w to a neighbour far away in relative terms; then the channel is better left alone.
    return torch.where(ok & ((stored / factor - 1).abs() < 0.05), stored, torch.ones_like(factor))


def _width(model: nn.Module, site: Site) -> int:
    assert site.producer is not None
    return int(site.producer.rows.max()) + 1 if site.producer.kind == "linear" else _norm_width(model, site)


def _norm_width(model: nn.Module, site: Site) -> int:
    assert site.producer is not None
    module = model.get_submodule(site.producer.module)
    return max(module.get_parameter(name).numel() for name in site.producer.parameters)


def snap(model: nn.Module, site: Site, transform: Transform) -> Transform:
    """``transform`` with the scale and shift that will really be in effect once the foldable part is stored in the model's
    dtype."""
    fold, leftover = split(model, site, transform)
    if fold is None:
        return transform
    if transform.scale is not None:
        transform = replace(transform, scale=fold.scale if leftover.scale is None else fold.scale * leftover.scale)
    return transform if transform.shift is None or leftover.shift is not None else replace(transform, shift=fold.shift)


def store_norms(model: nn.Module, folds: Sequence[Fold], undo: ExitStack | None) -> None:
    """Write the folded norm parameters in place; ``undo`` is told before each how to take it back."""
    for fold in folds:
        assert fold.site.producer is not None
        for name, value in fold.parameters.items():
            parameter = model.get_submodule(fold.site.producer.module).get_parameter(name)
            if undo is not None:
                undo.callback(parameter.data.copy_, parameter.detach().clone())
            parameter.data.copy_(value)


def changed_rows(folds: Sequence[Fold]) -> dict[str, Rows]:
    """Linear name -> what becomes of its first output rows; several sites may share a producer."""
    changes: dict[str, Rows] = {}
    for fold in folds:
        assert fold.site.producer is not None
        if fold.rows is not None:
            name = fold.site.producer.module
            known = changes.get(name)
            changes[name] = fold.rows if known is None else _one_after_the_other(known, fold.rows)
    return changes


@dataclass(frozen=True)
class Reorder:
    """A permutation that the carriers of a site take over: the activation arrives in its new order.

    Attributes:
        site: whose channels.
        permutation: ``[K]`` int64, in place of which channel the one at i arrives.
        sources: linear -> ``[n]`` int64, which old row its first n new ones are.
    """

    site: Site
    permutation: Tensor
    sources: dict[str, Tensor]

    @property
    def inverse(self) -> Tensor:
        """``[K]`` int64: indexing with it brings an activation back to the old order."""
        return self.permutation.argsort()


def split_order(site: Site, leftover: Transform) -> tuple[Reorder | None, Transform]:
    """The order that the site's carriers can bring about, and ``leftover`` (from :func:`split`) in the terms of that order."""
    order = leftover.permutation
    sources = None if order is None or site.carriers is None else site.carriers.sources(order)
    if order is None or sources is None:
        return None, leftover
    reorder = Reorder(site, order, sources)

    def moved(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[order]

    outliers = None if leftover.outliers is None else reorder.inverse[leftover.outliers]
    left = replace(
        leftover, permutation=None, scale=moved(leftover.scale), shift=moved(leftover.shift), outliers=outliers
    )  # fmt: skip
    return reorder, left


@dataclass(frozen=True)
class Pieces:
    """A plan taken apart: what is folded where, and what each site is left with at run time; by the name of the site.

    Attributes:
        folds: what producers take over.
        reorders: what carriers take over.
        leftovers: what runs at inference.
    """

    folds: Mapping[str, Fold]
    reorders: Mapping[str, Reorder]
    leftovers: Mapping[str, Transform]


def split_all(model: nn.Module, plan: ModelPlan) -> Pieces:
    """Take the transforms of ``plan`` apart for ``model``, which is only looked at."""
    folds, reorders, leftovers = {}, {}, {}
    for site in plan.sites:
        name = site.site.name
        fold, leftovers[name] = split(model, site.site, site.transform)
        if fold is not None:
            folds[name] = fold
        if site.reorders:
            reorder, leftovers[name] = split_order(site.site, leftovers[name])
            if reorder is not None:
                reorders[name] = reorder
    return Pieces(folds, reorders, leftovers)


def row_sources(reorders: Sequence[Reorder]) -> dict[str, Tensor]:
    """Linear name -> ``[n]`` int64, which old row its first n new ones are."""
    return {name: source for reorder in reorders for name, source in reorder.sources.items()}


def _one_after_the_other(a: Rows, b: Rows) -> Rows:
    n = max(len(a.factor), len(b.factor))
    first, second = (torch.cat([x.factor, x.factor.new_ones(n - len(x.factor))]) for x in (a, b))
    before, after = (torch.cat([x.shift, x.shift.new_zeros(n - len(x.shift))]) for x in (a, b))
    return Rows(first * second, before + after / first)
