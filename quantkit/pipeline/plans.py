"""The two halves of :func:`quantkit.quantize` by themselves: deciding, which gives a plan, and carrying a plan out.

In between, a plan can be saved, looked at, or taken to another process, which carries it out on its own copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from quantkit.calibrators import Calibrator
from quantkit.core.plan import ModelPlan
from quantkit.core.progress import Progress
from quantkit.core.scheme import Scheme
from quantkit.model.compiled import eagerly, uncompiled
from quantkit.model.experts import unfuse
from quantkit.model.guard import Guard
from quantkit.pipeline.account import say
from quantkit.pipeline.check import Request, check
from quantkit.pipeline.convert import carry_out
from quantkit.pipeline.quantize import decided

M = TypeVar("M", bound=nn.Module)


@eagerly
@torch.inference_mode(False)
def plan(
    model: nn.Module,
    method: str | Calibrator | Sequence[str | Calibrator] = "smoothquant",
    *,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    scheme: str | Scheme | None = "w8a8",
    ignore: Sequence[str | type] = (),
    targets: Sequence[str | type] | None = None,
    heads: bool = False,
    seed: int = 0,
    progress: Progress = None,
) -> ModelPlan:
    """Everything that :func:`quantkit.quantize` would decide about ``model``, which stays as it is.

    One function because its parameters are the choices that a user has.

    Takes the same arguments. ``quantkit.convert(model, plan)`` carries the plan out, now or another day, on this model or on
    another copy of it; see also :func:`quantkit.save_plan`.

    Raises:
        QuantkitError: as :func:`quantkit.quantize`.
    """
    request = Request.of(method, scheme, ignore=ignore, targets=targets, heads=heads, seed=seed, progress=progress)
    model = uncompiled(model)
    check(model, request)
    guard = Guard(model)
    try:
        if request.takes_experts_apart:
            unfuse(model)
        return decided(model, request, calibration, tokenizer, guard.undo).plan
    finally:
        guard.give_back()


@eagerly
@torch.inference_mode(False)
def convert(model: M, plan: ModelPlan, *, progress: Progress = None) -> M:
    """Carry out ``plan``, made for this model or a copy of it with the same weights, in place.

    Args:
        model: the float model.
        plan: from :func:`quantkit.plan` or :func:`quantkit.load_plan`.
        progress: as in :func:`quantkit.quantize`.

    Returns:
        The same object. Its report has no signal-to-noise ratios, which take calibration data.

    Raises:
        ModelError: the model is quantized already, or has other layers than those of the plan; it is not changed.
    """
    say(carry_out(uncompiled(model), plan, progress))
    return model
