"""Output heads in INT8. One that is tied to an embedding gets a weight of its own first; the embedding stays as it is."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from quantkit.core.errors import MethodError
from quantkit.core.plan import ModelPlan
from quantkit.discovery.equivalence import outputs_of, relative_error
from quantkit.model.targets import matches
from quantkit.model.ties import tied_to_embeddings, untie
from quantkit.pipeline.check import Request


def free_heads(model: nn.Module, request: Request, piece: Any, undo: ExitStack) -> list[str]:
    """Untie the output heads that are to become INT8.

    Returns:
        What was done, in sentences for the report.

    Raises:
        MethodError: the model computes something else without the tie, or transformers would tie it again on loading.
    """
    if not request.heads:
        return []
    modules = dict(model.named_modules())
    names = [name for name in tied_to_embeddings(model) if not any(matches(name, modules[name], p) for p in request.ignore)]
    if not names:
        return []
    wanted = outputs_of(model, piece)
    noise = relative_error(wanted, outputs_of(model, piece))
    untie(model, names, undo)
    if relative_error(wanted, outputs_of(model, piece)) > noise:
        raise MethodError(
            f"{', '.join(names)}: {type(model).__name__} computes something else where it is not tied to the embedding; it "
            "was undone: leave out heads="
        )
    return [f"output head {name} has codes of its own beside the embedding that it was tied to" for name in names]


def free_planned_heads(model: nn.Module, plan: ModelPlan, undo: ExitStack) -> None:
    """Untie what ``plan`` quantizes although it is tied to an embedding.

    Raises:
        MethodError: as :func:`free_heads`.
    """
    planned = {name for site in plan.sites for name in site.linears} if plan.scheme is not None else set()
    untie(model, [name for name in tied_to_embeddings(model) if name in planned], undo)
