"""The converted model is run, and held against what the float model said: the last step of :func:`quantkit.quantize`.

Each layer has been compared with the float layer that it replaces, by itself. That proves nothing of the model: code around a
layer may read its weight, a hook may be gone, a scale may belong to another layer. So the model is run as a whole, before and
after, on a piece of calibration data.

How near the outputs should be is asked of the model itself. Noise of the size that each layer has by itself is added to its
output, and what becomes of it at the end of the model is the *expected* distance. Where the measured distance is far larger
than that, something besides rounding has happened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibration.data import probe_batch
from quantkit.core.errors import EquivalenceError, ModelError, QuantkitError
from quantkit.core.report import Report, Verification
from quantkit.core.sites import Kept
from quantkit.discovery.equivalence import decibels, run_alike, tolerance_for
from quantkit.layers.attention import attention_quantizers
from quantkit.layers.linear import W8A8Linear
from quantkit.pipeline.data import Data

SLACK_DB = 10.0
"""A model may be this much farther from the float model than its layers lead to expect: their errors may have the same sign,
and the tokens on which a layer was measured are not those of the check."""
TOKENS = 64
"""Of the piece on which a model is run."""
NOISE_RUNS = 2
"""Of the model with noise; the one that ends farther off counts."""
TINY = 1e-18
"""Outputs below it say nothing: their squares are no numbers in float32, and scales have a floor."""
MANY = 64
"""An output of fewer values than this may be far off by chance, and gets more slack."""


@dataclass(frozen=True)
class Heard:
    """What the float model said to a piece of the data.

    Attributes:
        piece: the batch.
        held_out: whether no calibrator sees it.
        outputs: copies of its floating-point outputs.
        exact: the distance in dB that rounding in the model's own dtype may cause.
    """

    piece: Any
    held_out: bool
    outputs: Sequence[Tensor]
    exact: float


def hear(model: nn.Module, data: Data) -> Heard:
    """Run the float model on one sample of the data, up to :data:`TOKENS` tokens of it."""
    held_out = data.held is not None
    piece = probe_batch(model, data.held if held_out else data.first, TOKENS)
    outputs = run_alike(model, piece)
    return Heard(piece, held_out, outputs, -20 * math.log10(tolerance_for(outputs, 0.0, model)))


def verified(model: nn.Module, heard: Heard, report: Report, undo: ExitStack | None) -> Verification:
    """:func:`verify`, and what to do where it fails.

    Args:
        model, heard, report: as there.
        undo: closing it gives the float model back; None if that cannot be had.

    Raises:
        ModelError, EquivalenceError: as there. The message names the layers to look at.
    """
    try:
        return verify(model, heard, report)
    except QuantkitError as error:
        if undo is None:
            raise type(error)(
                f"{error}. The model was too large to be kept in floating point: load it again. verify=False skips this check"
            ) from error
        after = _layer_outputs(model, heard, report)
        undo.close()
        off = _first_off(_layer_outputs(model, heard, report), after, report)
        where = f"Look at what surrounds {', '.join(off)}, where the difference begins" if off else "No layer by itself is off"
        way_out = f"ignore={off[:1] or '[...]'} keeps layers in floating point, and verify=False skips this check"
        raise type(error)(f"{error}. {where}; the model is in floating point again. {way_out}") from error


def verify(model: nn.Module, heard: Heard, report: Report) -> Verification:
    """Run the converted ``model``, and compare what it says with what the float model said.

    Args:
        model: converted.
        heard: from before.
        report: of the conversion, with the signal to noise ratio of each layer.

    Raises:
        ModelError: it cannot run.
        EquivalenceError: it is far from the float model, and its layers do not explain that.
    """
    try:
        got = run_alike(model, heard.piece)
    except Exception as error:  # whatever the model's own code makes of an INT8 layer
        raise ModelError(f"the converted model cannot run ({type(error).__name__}: {error})") from error
    if [t.shape for t in got] != [t.shape for t in heard.outputs]:
        raise EquivalenceError("the converted model returns tensors of other shapes than the float model")
    rounded = bool(attention_quantizers(model))  # by how much is known of no module alone
    levels = {} if rounded else _levels(report)
    tried = [_with_noise(model, levels, heard.piece, seed) for seed in range(NOISE_RUNS)] if levels else []
    noisy = [run for run in tried if [t.shape for t in run] == [t.shape for t in got]]
    rounded = rounded or len(noisy) < len(tried)  # a model that decides on lengths may decide otherwise for any noise
    measured, expected = [], []
    for index, wanted in enumerate(heard.outputs):
        if not wanted.numel() or bool(wanted.isnan().any()) or not bool((wanted.abs() > TINY).any()):
            continue
        measured.append(decibels(wanted, got[index]))
        expected.append(min((decibels(got[index], run[index]) for run in noisy), default=heard.exact))
        measure = _typical if levels else None  # where nothing is rounded, no token may be off
        is_ = decibels(wanted, got[index], measure)
        should = min((decibels(got[index], run[index], measure) for run in noisy), default=heard.exact)
        slack = SLACK_DB + max(0.0, 10 * math.log10(MANY / wanted.numel()))
        if (not rounded and is_ < min(should, heard.exact) - slack) or measured[-1] == -math.inf:
            raise EquivalenceError(
                f"the converted model is at {is_:.1f} dB from the float model (output {index} of {len(got)}), where its layers "
                f"by themselves lead to expect {should:.1f} dB"
            )
    logits = next((i for i, t in enumerate(got) if t.dim() > 1 and t.shape[-1] in _vocabularies(model, report)), None)
    said = {} if logits is None else _predictions(heard.outputs[logits], got[logits])
    return Verification(min(measured, default=None), min(expected, default=None) if levels else None, heard.held_out, **said)


def _levels(report: Report) -> dict[str, float]:
    """Signal to noise ratio in dB of each layer by itself, by its name."""
    return {r.name: r.sqnr_db for r in report.layers if r.sqnr_db is not None and math.isfinite(r.sqnr_db)}


def _layer_outputs(model: nn.Module, heard: Heard, report: Report) -> dict[str, Tensor]:
    """Name of a layer -> ``[M, N]`` float32, what it puts out in its first call; in the order of the calls."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found.setdefault(name, output.detach().float().reshape(-1, output.shape[-1]))

        return hook

    with ExitStack() as stack:
        for name in _levels(report):
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        with suppress(Exception):  # it may be what cannot run
            run_alike(model, heard.piece)
    return found


def _first_off(before: Mapping[str, Tensor], after: Mapping[str, Tensor], report: Report, count: int = 3) -> list[str]:
    """Names of the first layers whose output differs by more than their own noise; a factor for each channel may be a fold."""
    levels, off = _levels(report), []
    for name, wanted in before.items():
        got = after.get(name)
        if got is None or got.shape != wanted.shape:
            off.append(name)
            continue
        factor = (wanted * got).sum(0) / got.pow(2).sum(0).clamp_min(1e-30)
        if decibels(wanted - wanted.mean(0), (got - got.mean(0)) * factor) < levels[name] - SLACK_DB:
            off.append(name)
    return off[:count]


def _with_noise(model: nn.Module, levels: Mapping[str, float], piece: Any, seed: int) -> list[Tensor]:
    """What the model says where the output of each layer in ``levels`` has noise of so many dB."""
    with _noise(model, levels, seed):
        return run_alike(model, piece)


@contextmanager
def _noise(model: nn.Module, levels: Mapping[str, float], seed: int) -> Iterator[None]:
    random = torch.Generator().manual_seed(seed)

    def add(level: float) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            y = output.float()
            size = y.pow(2).mean().sqrt() * 10 ** (-level / 20)
            noise = torch.randn(y.shape, generator=random, dtype=torch.float32, device="cpu")
            return (y + size * noise.to(y.device)).to(output.dtype)

        return hook

    with ExitStack() as stack:
        for name, level in levels.items():
            stack.callback(model.get_submodule(name).register_forward_hook(add(level)).remove)
        yield


def _typical(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The relative error of a row in the middle. A few tokens may well be far off: a router sent them to another expert."""
    a, b = (t[0].double().reshape(-1, t[0].shape[-1] if t[0].dim() else 1) for t in (wanted, got))
    difference, signal = torch.where(a == b, 0.0, a - b), torch.where(a.isinf(), 0.0, a)
    error = difference.pow(2).mean(-1).sqrt().median() / signal.pow(2).mean().sqrt()
    return float(error.nan_to_num(math.inf))


def _vocabularies(model: nn.Module, report: Report) -> set[int]:
    """Sizes of what output heads put out."""
    heads = [model.get_submodule(r.name) for r in report.layers if r.kind == "float" and r.reason in (Kept.HEAD, Kept.TIED)]
    own = getattr(model, "get_output_embeddings", lambda: None)()
    return {int(head.out_features) for head in (*heads, own) if isinstance(head, nn.Linear | W8A8Linear)}


def _predictions(wanted: Tensor, got: Tensor) -> dict[str, float]:
    """KL divergence in nats and share of equal favourites, of two tensors of logits."""
    a, b = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
    finite = torch.where(a.isinf(), 0.0, a - b)
    return {
        "kl": float((a.exp() * finite).sum(-1).mean()),
        "top1": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    }
