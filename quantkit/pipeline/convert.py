"""Converting: a function of a model and a plan. This is where linears become INT8 layers, and float weights take folds over.

Whatever can be wrong with a plan is found before, by :mod:`.answers` and :mod:`.prove`. So nothing here raises on purpose once
the first weight has changed. If something does (memory, Ctrl-C), :mod:`quantkit.model.guard` gives the float model back, or, if
its weights were too large to be kept for that, marks it as of no use.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import ModelError
from quantkit.core.numerics import sqnr_db
from quantkit.core.operand import Operand
from quantkit.core.plan import Codes, LinearPlan, ModelPlan, SitePlan
from quantkit.core.progress import Progress, tracked
from quantkit.core.report import LayerRecord, Report, attach
from quantkit.core.weights import round_weight
from quantkit.layers.attention import AttentionQuantizer, attach_attention, detach_attention, explained
from quantkit.layers.linear import W8A8Linear
from quantkit.model.experts import put_back, unfuse
from quantkit.model.guard import Guard
from quantkit.model.modules import linears_of, parents_of, replace_module, weight_of
from quantkit.pipeline.account import account
from quantkit.pipeline.check import check_model
from quantkit.pipeline.fold import Fold, Pieces, Reorder, Rows, changed_rows, row_sources, split_all, store_norms
from quantkit.pipeline.heads import free_planned_heads
from quantkit.pipeline.rotate import rotate

Tokens = Callable[[str], Tensor | None]


def carry_out(model: nn.Module, plan: ModelPlan, progress: Progress = None) -> Report:
    """Carry ``plan`` out on a float model that nothing has been done to.

    Raises:
        ModelError: the model is quantized already, or has other layers than those of the plan; it is not changed.
    """
    check_model(model)
    guard = Guard(model)
    try:
        apart = unfuse(model) if plan.scheme is not None or plan.rotations else []
        check_fits(model, plan)
        free_planned_heads(model, plan, guard.undo)
        for what in plan.rotations:
            rotate(model, what, guard.undo)
        report = convert_rotated(model, plan, progress=progress, undo=guard.undo if guard.let_go() else None)
        put_back(model, apart)
        attach(model, report)
        guard.finished = True
    except BaseException:
        guard.give_back()
        raise
    return report


def check_fits(model: nn.Module, plan: ModelPlan) -> None:
    """Raises ModelError where ``model`` lacks a module that the plan changes, or has a linear of another size."""
    modules, linears = dict(model.named_modules()), linears_of(model)
    for site in plan.sites:
        for name in site.site.linears:
            if name not in linears:
                raise ModelError(f"the plan is of another model: it changes {name!r}, and this model has no such linear")
            channels = weight_of(linears[name]).shape[1]
            if channels != site.site.channels:
                raise ModelError(
                    f"the plan is of another model: {name!r} has {site.site.channels} input features there and {channels} here"
                )
        for name, own in site.linears.items():
            rows = len(weight_of(linears[name]))
            given = [t for t in (None if own.codes is None else own.codes.codes, own.clip) if t is not None]
            if any(len(tensor) != rows for tensor in given):
                raise ModelError(
                    f"the plan is of another model: {name!r} has {len(given[0])} output features there and {rows} here"
                )
        producer = site.site.producer
        if producer is not None and producer.module not in modules:
            raise ModelError(f"the plan is of another model: it folds into {producer.module!r}, which this model does not have")
    missing = next((name for name in plan.attention if name not in modules), None)
    if missing is not None:
        raise ModelError(
            f"the plan is of another model: it rounds the attention of {missing!r}, which this model does not have"
        )


def convert_rotated(
    model: nn.Module,
    plan: ModelPlan,
    *,
    tokens: Tokens | None = None,
    progress: Progress = None,
    undo: ExitStack | None = None,
) -> Report:
    """Carry out what is left of ``plan`` on a model whose spaces are rotated already; returns the report.

    Args:
        model: changed in place.
        plan: for this very model.
        tokens: gives tokens ``[n, K]`` float32 of a site, on which the output of each layer is compared with the float one.
        progress: as in :func:`quantkit.quantize`.
        undo: closing it afterwards puts every bit and every module back. Until then float weights stay in memory.
    """
    report = change(model, plan, tokens=tokens, progress=progress, undo=undo)
    asked = report.recipe or {}
    account(model, report, asked.get("ignore", ()), asked.get("targets"))
    return report


def change(
    model: nn.Module,
    plan: ModelPlan,
    *,
    tokens: Tokens | None = None,
    progress: Progress = None,
    undo: ExitStack | None = None,
) -> Report:
    """Fold, swap and round, in place; with ``undo``, closing it puts every bit and every module back."""
    change = _Change(model, plan, split_all(model, plan), tokens, undo)
    change.norms()
    layers = []
    for site in tracked(plan.sites, "converting", progress, "site"):
        layers += [change.linear(site, name) for name in site.site.linears]
    change.others()
    report = replace(plan.report, layers=layers, rewrites=[*plan.report.rewrites, *change.attention()])
    done = {layer.name for layer in layers}
    report.layers += [LayerRecord(name, "float", reason=reason) for name, reason in plan.kept.items() if name not in done]
    return report


class _Change:
    """One conversion under way."""

    def __init__(
        self, model: nn.Module, plan: ModelPlan, pieces: Pieces, tokens: Tokens | None, undo: ExitStack | None
    ) -> None:
        self.model, self.plan, self.pieces, self.tokens, self.undo = model, plan, pieces, tokens, undo
        self.parents = parents_of(model)
        self.rows, self.sources = changed_rows(list(pieces.folds.values())), row_sources(list(pieces.reorders.values()))

    def norms(self) -> None:
        """Norms take their folds over."""
        store_norms(self.model, list(self.pieces.folds.values()), self.undo)

    def linear(self, plan: SitePlan, name: str) -> LayerRecord:
        """One linear of a site becomes INT8, or takes over what concerns it and stays in floating point."""
        linear, site, pieces = self.model.get_submodule(name), plan.site.name, self.pieces
        fold, order, leftover = pieces.folds.get(site), pieces.reorders.get(site), pieces.leftovers[site]
        rows, source = self.rows.pop(name, None), self.sources.pop(name, None)
        said = {"order": f"of the rows of {' and '.join(order.sources)}"} if order else {}
        into = plan.site.producer.module if plan.site.producer and fold is not None else None
        reason = self.plan.kept.get(name) or plan.site.reason
        layer = LayerRecord(name, "float", site, into, reason=reason, notes={**plan.notes, **said})
        if self.plan.scheme is None or name not in plan.linears:
            self.float(linear, fold, rows, order, source)
            return layer
        new = quantized(linear, plan, plan.linears[name], leftover, rows)
        tokens = None if self.tokens is None else self.tokens(site)
        if tokens is not None and not tokens.any():
            layer.notes["calibration"] = "all tokens were zero"  # there is no signal to compare noise with
        elif tokens is not None:
            layer.sqnr_db = output_sqnr(tokens, plan, linear, new, Changes(fold, rows, order))
        if source is not None:
            new = W8A8Linear.from_operand(reordered(new.operand, source), new.placeholder.dtype).train(linear.training)
        layer.kind, layer.at_run_time = "int8", leftover.without("groups").steps
        if plan.scheme != self.plan.scheme.of_linear():
            layer.notes["scheme"] = plan.scheme.name
        if self.undo is not None:
            self.undo.callback(replace_module, self.model, name, linear, self.parents)
        replace_module(self.model, name, new, self.parents)
        return layer

    def others(self) -> None:
        """Producers and carriers that are in no site take over what concerns them."""
        for name in self.rows | self.sources:
            self.float(self.model.get_submodule(name), None, self.rows.get(name), None, self.sources.get(name))

    def float(self, linear: Any, fold: Fold | None, rows: Rows | None, order: Reorder | None, source: Tensor | None) -> None:
        """Change the weight and bias of a linear that stays in floating point."""
        if fold is None and rows is None and order is None and source is None:
            return
        if self.undo is not None:
            for parameter in linear.parameters(recurse=False):
                self.undo.callback(parameter.data.copy_, parameter.detach().clone())
        change_float(linear, fold, rows, order, source)

    def attention(self) -> list[str]:
        """Attention is rounded from now on; what is said about it in the report."""
        quantizers = {}
        for name, plan in self.plan.attention.items():
            device = next(iter(plan.tensors.values())).device if plan.tensors else None
            quantizers[name] = AttentionQuantizer(plan.scheme, plan.heads, plan.clusters, device)
            quantizers[name].load_state_dict(plan.tensors)
        attach_attention(self.model, quantizers)
        if self.undo is not None and quantizers:
            self.undo.callback(detach_attention, self.model)
        return explained(quantizers)


@dataclass(frozen=True)
class Changes:
    """What the modules around a linear have taken over: the fold and the order of its input, and what became of its rows."""

    fold: Fold | None
    rows: Rows | None
    order: Reorder | None


def change_float(linear: Any, fold: Fold | None, rows: Rows | None, order: Reorder | None, source: Tensor | None) -> None:
    """Change a float linear in place, in float32.

    Args:
        linear: the linear.
        fold: is undone in the columns of its weight, and in its bias.
        rows: what becomes of its first rows, and of its bias.
        order: the order in which its columns arrive from now on.
        source: ``[n]`` int64, which rows take the place of the first n, last of all.
    """
    weight = weight_of(linear)
    new, bias = weight.float(), None if linear.bias is None else linear.bias.data.float()
    if fold is not None:
        bias = None if bias is None else bias + new @ fold.shift
        new = new * fold.scale
    if order is not None:
        new = new[:, order.permutation]
    if rows is not None:
        n = len(rows.factor)
        new = torch.cat([new[:n] * rows.factor[:, None], new[n:]])
        bias = None if bias is None else torch.cat([(bias[:n] - rows.shift) * rows.factor, bias[n:]])
    if bias is not None:
        linear.bias.data.copy_(bias)
    if source is not None:
        source = source.to(new.device)
        new[: len(source)] = new[source]
        if linear.bias is not None:
            linear.bias.data[: len(source)] = linear.bias.data[source]
    weight.copy_(new)


def quantized(linear: Any, plan: SitePlan, own: LinearPlan, leftover: Any, rows: Rows | None) -> W8A8Linear:
    """The INT8 layer in place of a float linear.

    Args:
        linear: gives weight and bias.
        plan, own: of its site, and of itself.
        leftover: what of the transform runs at inference.
        rows: what a fold makes of its first output rows. It only moves the scales of these rows: the codes stay.
    """
    weight, transform = weight_of(linear).float(), plan.transform
    bias = None if linear.bias is None else linear.bias.detach().float()
    extra = transform.bias(weight)
    bias = extra if bias is None else bias if extra is None else bias + extra
    inner, side = transform.weight(weight)
    if side is not None and leftover.scale is not None:
        side = side / leftover.scale[leftover.outliers]
    codes = own.codes
    if codes is None:
        codes = Codes(*round_weight(inner, plan.scheme.weight.in_groups(transform.groups or ()), clip=own.clip))
    scale = codes.scale
    if rows is not None:
        n = len(weight) - len(rows.factor)
        factor = torch.cat([rows.factor, rows.factor.new_ones(n)])
        scale = torch.cat([scale[:, :1] * factor[:, None], scale[:, 1:]], 1)
        bias = None if bias is None else (bias - torch.cat([rows.shift, rows.shift.new_zeros(n)])) * factor
        side = None if side is None else side * factor[:, None]
    return W8A8Linear.from_float(
        linear, scheme=plan.scheme, codes=codes.codes, weight_scale=scale, bias=bias, leftover=leftover,
        outlier_weight=side, input_range=plan.input_range,
    )  # fmt: skip


def reordered(operand: Operand, source: Tensor) -> Operand:
    """``operand`` with the output rows ``source [n]`` int64 in the place of its first n."""
    order = torch.arange(operand.out_features, device=operand.device, dtype=torch.int64)
    order[: len(source)] = source.to(order.device)
    return operand.rows(order)


def output_sqnr(tokens: Tensor, plan: SitePlan, linear: nn.Module, new: W8A8Linear, changes: Changes) -> float:
    """Signal to noise in decibels of the output of ``new`` on ``tokens [n, K]``, against the float layer that it replaces."""
    weight, fold, order, rows = weight_of(linear).float(), changes.fold, changes.order, changes.rows
    wanted = tokens @ weight.t()
    given = tokens if fold is None else (tokens - fold.shift) / fold.scale
    got = new(given if order is None else given[:, order.permutation])
    if new.bias is not None:
        got = got - new.bias.float()
    if plan.transform.shift is not None:
        wanted = wanted - weight @ plan.transform.shift
    if rows is not None:
        wanted[:, : len(rows.factor)] *= rows.factor
    return sqnr_db(wanted, got)
