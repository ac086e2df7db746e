"""The proof that folding preserves the function: played on the float model, with the values that will be stored."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from quantkit.core.errors import EquivalenceError
from quantkit.core.plan import ModelPlan
from quantkit.discovery.equivalence import outputs_of, relative_error, tolerance_for
from quantkit.discovery.hooks import PlayedFold, PlayedOrder, folded_by_hooks, reordered_by_hooks
from quantkit.pipeline.fold import Fold, Reorder, split_all, store_norms

log = logging.getLogger("quantkit")


def prove(model: nn.Module, plan: ModelPlan, piece: Any, undo: ExitStack) -> ModelPlan:
    """``plan`` with what is proven on a small batch: the folds, which must hold, and the orders of channels, which may.

    Norms are written for the time of the proof, and everything else is played through hooks; afterwards the model is what it
    was, at the latest when ``undo`` is closed.

    Raises:
        EquivalenceError: folding would change the function of the model.
    """
    wished = replace(plan, sites=tuple(replace(site, reorders=True) for site in plan.sites))
    pieces = split_all(model, wished)
    folds, reorders = list(pieces.folds.values()), list(pieces.reorders.values())
    if not folds and not reorders:
        planned = plan.scheme is None or any(not site.transform.is_identity for site in plan.sites)
        return replace(plan, report=replace(plan.report, equivalence=0.0)) if planned else plan
    error, ordered = _played(model, folds, reorders, piece, undo)
    if folds and not any(bool((fold.scale != 1).any()) or bool(fold.shift.any()) for fold in folds):
        log.warning("every smoothing scale is 1: the transformation did nothing")
    sites = tuple(replace(site, reorders=ordered and site.site.name in pieces.reorders) for site in plan.sites)
    return replace(plan, sites=sites, report=replace(plan.report, equivalence=error))


def _played(
    model: nn.Module, folds: Sequence[Fold], reorders: Sequence[Reorder], piece: Any, undo: ExitStack
) -> tuple[float, bool]:
    """The relative change of the model's output, and whether it includes the orders."""
    wanted = outputs_of(model, piece)
    noise = relative_error(wanted, outputs_of(model, piece))
    played = [PlayedFold(f.site, f.rows, f.scale, f.shift) for f in folds]
    moved = [PlayedOrder(r.site.linears, r.inverse, r.sources) for r in reorders]

    def error_with(orders: Sequence[PlayedOrder]) -> float:
        with reordered_by_hooks(model, orders), folded_by_hooks(model, played):
            return relative_error(wanted, outputs_of(model, piece))

    with ExitStack() as written:
        undo.push(written)  # which an interruption may keep from being left
        store_norms(model, folds, written)
        tolerance = tolerance_for(wanted, noise, model)
        error = error_with(moved)
        ordered = error <= tolerance
        if not ordered and moved:
            log.warning("the orders of %d sites cannot be folded, and are brought about at run time", len(moved))
            error = error_with([])
    if error > tolerance:
        raise EquivalenceError(
            f"folding changed the model by {error:.1e} (allowed {tolerance:.1e}); it was undone. "
            "Please report the architecture; quantkit.quantize(model, method='rtn') needs no folding"
        )
    return error, ordered
