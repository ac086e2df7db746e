"""quantize(): the straight line. Everything up to ``convert`` only looks, and decides; ``convert`` changes the model.

===============  =====================================================================================================
check            refuse what cannot work before the model runs (:mod:`.check`)
data             the calibration data, and a small piece of it to probe with (:mod:`.data`)
rotate           rewrite the float model as a whole, if a method asks for it, and prove it the same (:mod:`.spaces`)
find             the sites of the model, and which linears stay in floating point (:mod:`.find`)
observe          one pass over the data collects statistics (:mod:`quantkit.calibration.observe`)
decide           calibrators turn statistics into a plan (:mod:`.decide`)
prove            play the folds of the plan on the float model: it must still compute the same (:mod:`.prove`)
convert          carry the plan out (:mod:`.convert`)
verify           run the model, and hold it against what the float model said (:mod:`.verify`)
===============  =====================================================================================================

Until ``convert`` has begun, an error or an interruption leaves the model as it was, to the bit. So does a failure of
``verify``, for models up to :data:`~quantkit.pipeline.restore.KEPT_BYTES`; others have to be loaded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from quantkit.calibration.data import probe_batch
from quantkit.calibrators import Calibrator
from quantkit.core.progress import Progress
from quantkit.core.report import attach
from quantkit.core.scheme import Scheme
from quantkit.model.compiled import eagerly, uncompiled
from quantkit.model.example import keep_example, made_up
from quantkit.model.experts import put_back, unfuse
from quantkit.model.guard import Guard
from quantkit.pipeline.account import say
from quantkit.pipeline.attention import attention_to_round, decide_attention
from quantkit.pipeline.check import Request, check, linears_to_choose_from
from quantkit.pipeline.convert import convert_rotated
from quantkit.pipeline.data import Data
from quantkit.pipeline.decide import Decision, decide
from quantkit.pipeline.find import find_sites
from quantkit.pipeline.heads import free_heads
from quantkit.pipeline.prove import prove
from quantkit.pipeline.spaces import rotate_spaces
from quantkit.pipeline.verify import hear, verified

PROOF_TOKENS = 2048
"""More than probing takes: tokens of another kind, such as those of images, take other ways through a model."""

M = TypeVar("M", bound=nn.Module)


@eagerly
@torch.inference_mode(False)  # what is created here must live outside of it
def quantize(
    model: M,
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
    verify: bool = True,
) -> M:
    """Quantize the linears of ``model`` to INT8 weights and INT8 activations, in place.

    One function because its parameters are the choices that a user has.

    Args:
        model: any module with its weights in memory; ``nn.Linear`` and transformers' ``Conv1D`` are replaced by
            :class:`quantkit.W8A8Linear`. What stays in floating point has its reason in the report.
        method: a name (``"smoothquant"``, ``"rtn"``), a calibrator, or a list of them, applied in order.
        calibration: an iterable of batches (tensors, dicts of keyword arguments, tuples of arguments), or strings with
            ``tokenizer``. Left out, a causal LM of transformers samples its own tokens.
        tokenizer: turns strings into tokens.
        scheme: a name or a :class:`quantkit.Scheme`; None applies only what preserves the function and leaves the
            model in floating point.
        ignore: layer names, globs or classes that stay in floating point.
        targets: if given, only these are quantized; they may include output heads, routers, and what transformers lists for
            float32.
        heads: quantize output heads as well. One that is tied to an embedding gets codes of its own, and the embedding stays as
            it is.
        seed: for sampled calibration data and for calibrators.
        progress: show progress bars, or call this function of ``(what, done, total)``; None decides by the terminal.
        verify: run the converted model on a piece of the data, and raise if it is farther from the float model than its layers
            explain. What is found is in the report.

    Returns:
        The same object. :func:`quantkit.report` tells what happened to every layer.

    Raises:
        QuantkitError: a subclass that says what is wrong, before the model is changed.
        ModelError, EquivalenceError: the converted model cannot run, or is not the same model any more. It is given back in
            floating point, unless the message says that it is too large for that.
    """
    request = Request.of(method, scheme, ignore=ignore, targets=targets, heads=heads, seed=seed, progress=progress)
    inner = uncompiled(model)
    check(inner, request)
    guard = Guard(inner)
    try:
        apart = unfuse(inner) if request.takes_experts_apart else []
        decision = decided(inner, request, calibration, tokenizer, guard.undo, listen=verify)
        kept = guard.undo if guard.let_go() else None
        report = convert_rotated(inner, decision.plan, tokens=decision.tokens, progress=progress, undo=kept)
        if decision.heard is not None:
            report.verification = verified(inner, decision.heard, report, kept)
            keep_example(inner, made_up(decision.heard.piece, seed))
        put_back(inner, apart)
        attach(inner, report)
        guard.finished = True
    except BaseException:
        guard.give_back()
        raise
    say(report)
    return model


def decided(
    model: nn.Module, request: Request, calibration: Any, tokenizer: Any, undo: ExitStack, *, listen: bool = False
) -> Decision:
    """The whole plan for a model. Its spaces are rotated afterwards, which ``undo`` puts back, and nothing else is changed.

    With ``listen`` it also holds what the model said before.
    """
    linears = linears_to_choose_from(model, request)
    data = Data.of(model, request, calibration, tokenizer, linears)
    heard = hear(model, data) if listen else None
    attention_heads = attention_to_round(model, request, data)
    freed = free_heads(model, request, data.piece, undo)
    rotations, said = rotate_spaces(model, request, data, undo)
    found = find_sites(model, request, data, linears)
    decision = decide(model, request, data, found, rotations, [*freed, *said])
    plan = prove(model, decision.plan, probe_batch(model, data.first, PROOF_TOKENS), undo)
    attention = decide_attention(model, plan, request, data, attention_heads)
    return replace(decision, plan=replace(plan, attention=attention), heard=heard)
