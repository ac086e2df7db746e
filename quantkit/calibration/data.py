"""Calibration data: what a user may pass as ``calibration=``, checked and made into batches.

Batches can be given as they are: tensors, dicts of keyword arguments or tuples of arguments for the model. Strings are turned
into windows of tokens by a tokenizer. Where nothing is given, a causal language model samples tokens from itself. Data never
comes from the network. Mistakes are refused here, before the model runs: the wrong type, no data at all, or tensors that are on
another device than the model.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.capture.step import CapturedStep, StepError
from quantkit.core.errors import CalibrationError, ModelError, QuantkitError
from quantkit.core.progress import Progress, counted
from quantkit.model.modules import all_tensors, call, evaluating, map_tensors, tensors_in

log = logging.getLogger("quantkit")

SELF_SEQUENCES, SELF_LENGTH = 32, 256
WORTH_CAPTURING = 64
"""Tokens from which on it takes less time to capture a step on a GPU than it saves."""
TEXT_LENGTH = 512


def calibration_batches(
    model: nn.Module,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    needed: bool = True,
    seed: int = 0,
    progress: Progress = None,
) -> Iterable[Any]:
    """Check what the user passed as ``calibration`` and turn it into an iterable of batches.

    Args:
        model: the model; a causal LM samples its own tokens when ``calibration`` is None.
        calibration: batches (tensors, dicts of keyword arguments, tuples of arguments), or strings with ``tokenizer``.
        tokenizer: a transformers tokenizer, for strings.
        needed: whether statistics are wanted; if not, a causal LM gets a few random tokens, enough to be probed.
        seed: for the model's own samples.
        progress: how the sampling tells how far it is, see :mod:`quantkit.core.progress`.

    Raises:
        CalibrationError: wrong type, empty, strings without tokenizer, tensors on another device than the model, or
            no data for a model that cannot sample its own.
    """
    if calibration is None:
        size = {} if needed else {"sequences": 1, "length": 16}
        return self_sampled(model, seed=seed, progress=progress if needed else False, **size)
    if isinstance(calibration, (str, bytes, Mapping, Tensor)) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}: pass an iterable of batches, such as a list of token tensors "
            "[batch, length], of dicts of keyword arguments, of tuples of arguments, or of strings together with tokenizer="
        )
    first, batches = peek(calibration)
    if isinstance(first, str):
        if tokenizer is None:
            raise CalibrationError("calibration holds strings: pass tokenizer= to turn them into tokens")
        return packed_text(batches, tokenizer, device=device_of(model))
    _check_batch(first, model)
    return batches


def peek(iterable: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first item, and an iterable that still begins with it.

    Raises:
        CalibrationError: there is no item.
    """
    iterator = iter(iterable)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError("calibration is empty: pass at least one batch") from None
    # A list or a DataLoader can be walked again from its start; a generator cannot, and must not lose its first item.
    return first, iterable if iterator is not iterable else itertools.chain([first], iterator)


def _check_batch(batch: Any, model: nn.Module) -> None:
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise CalibrationError(
            f"a calibration batch is a {type(batch).__name__}: pass tensors, dicts of keyword arguments or tuples of arguments"
        )
    tensors = all_tensors(batch)
    if not tensors:
        raise CalibrationError("the first calibration batch holds no tensor")
    if not any(t.numel() for t in tensors):
        raise CalibrationError("the first calibration batch is empty: its tensors have no elements")
    device = device_of(model)
    wrong = next((t.device for t in tensors if t.device.type != device.type), None)
    if wrong is not None:
        raise CalibrationError(f"calibration is on {wrong} and the model on {device}: move the batches to {device} first")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def packed_text(texts: Iterable[str], tokenizer: Any, *, length: int = TEXT_LENGTH, device: Any = "cpu") -> list[Tensor]:
    """Token windows ``[1, length]`` of all texts joined, as language models are trained; a short text makes one window."""
    tokens: list[int] = []
    for text in texts:
        if not isinstance(text, str):
            raise CalibrationError(f"calibration mixes strings with a {type(text).__name__}: pass strings only")
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(tokens) < 2:
        raise CalibrationError("the calibration texts hold fewer than two tokens: pass more text")
    ids = torch.tensor(tokens, device=device, dtype=torch.int64)
    whole = len(ids) // length
    return list(ids[: whole * length].view(whole, 1, length)) if whole else [ids[None]]


def self_sampled(
    model: nn.Module,
    *,
    sequences: int = SELF_SEQUENCES,
    length: int = SELF_LENGTH,
    batch: int | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> list[Tensor]:
    """Token windows that a causal LM writes itself: a random first token, then samples from its own distribution.

    A model's own samples follow its training distribution closely enough for activation ranges (LLM-QAT, section 3). On a GPU
    its step is captured, see :class:`quantkit.CapturedStep`.

    Args:
        batch: sequences at a time; left out, 16 on a CPU and all on a GPU.

    Returns:
        ``sequences / batch`` tensors ``[batch, length]`` int64.

    Raises:
        CalibrationError: the model is no causal LM of transformers.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if head is None or vocabulary is None or not getattr(model, "can_generate", lambda: False)() or _is_encoder_decoder(model):
        raise CalibrationError(
            f"calibration is missing: {type(model).__name__} is no causal language model that could sample its own; pass "
            "calibration=[...], an iterable of batches: tensors, dicts of keyword arguments or tuples of arguments"
        )
    if sequences > 1:
        log.info("no calibration data: sampling %d x %d tokens from the model itself (seed %d)", sequences, length, seed)
    device = device_of(model)
    batch = batch or (sequences if device.type == "cuda" else 16)
    random = torch.Generator(device).manual_seed(seed)
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    out = []
    starts = range(0, sequences, batch)
    with evaluating(model), counted(len(starts) * (length - 1), "sampling", progress, "tok") as advance:
        for start in starts:
            size = (min(batch, sequences - start), 1)
            ids = torch.randint(0, vocabulary, size, generator=random, dtype=torch.int64, device=device)
            out.append(_continue(model, ids, length, random, advance))
    return out


def _continue(model: nn.Module, ids: Tensor, length: int, random: torch.Generator, advance: Callable[[], object]) -> Tensor:
    """Sample until each row of ``ids [B, 1]`` has ``length`` tokens; ``advance`` is called after each step."""
    captured = _captured(model, length) if ids.is_cuda and length >= WORTH_CAPTURING else None
    step, cache = ids, None
    while ids.shape[1] < length:
        if captured is not None:
            logits = captured(step, torch.full_like(step, ids.shape[1] - 1))
        else:
            result = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, logits = getattr(result, "past_key_values", None), result.logits[:, -1]
        probabilities = logits.float().softmax(-1)
        if not bool(probabilities.isfinite().all()):
            raise CalibrationError(
                f"{type(model).__name__} cannot sample its own calibration data, since its logits are NaN or Inf: look at its "
                "weights and its dtype, or pass calibration=[...]"
            )
        chosen = torch.multinomial(probabilities, 1, generator=random)
        ids = torch.cat([ids, chosen], 1)
        step = chosen if cache is not None or captured is not None else ids
        advance()
    return ids


def _captured(model: Any, length: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A step on tokens ``[B, 1]`` at positions ``[B, 1]`` that gives logits ``[B, V]``; None for models without such."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return None
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):  # Python counts the tokens of such
        return None

    def step(token: Tensor, position: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits

    captured: Callable[[Tensor, Tensor], Tensor] = CapturedStep(step, model)

    def run(token: Tensor, position: Tensor) -> Tensor:
        nonlocal captured
        if captured is not step:
            try:
                return captured(token, position)
            except ModelError as error:
                log.info("sampling in eager mode: %s", error)
                captured = step
                if isinstance(error, StepError):
                    logits: Tensor = error.outputs
                    return logits
        return step(token, position)

    return run


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def probe_batch(model: nn.Module, batch: Any, tokens: int = 16) -> Any:
    """A small piece of a calibration batch for probing: one sample, and at most ``tokens`` of its tokens.

    Only integer tensors and masks of the same length are cut along the sequence, where the fewest tokens are masked. A model
    that does not accept the piece gets the whole batch.

    Raises:
        CalibrationError: the model does not accept that either.
    """
    tensors = all_tensors(batch)
    samples = next((len(t) for t in tensors if t.dim()), None)
    ids = [t for t in tensors if not t.is_floating_point() and t.dim() == 2]
    length = ids[0].shape[1] if ids else None
    # plain features [rows, channels]: rows are the tokens
    rows = 1 if ids or any(t.dim() > 2 for t in tensors) else tokens
    place = _least_masked(_masks(model, batch), ids[0].shape, tokens) if ids else (0, 0)

    def cut(t: Tensor) -> Tensor:
        if place is None or not t.dim() or len(t) != samples:
            return t
        row, start = place
        t = t[row : row + rows]
        return t[:, start : start + tokens] if t.dim() == 2 and t.shape[1] == length else t

    try:
        piece = map_tensors(batch, cut)
        with evaluating(model):
            list(tensors_in(call(model, piece)))
    except Exception as error:  # noqa: BLE001  whatever a model may raise on a cut input, the whole batch is the answer
        log.debug("probing with the whole first batch, since a piece of it fails: %s", error)
        return _runs(model, batch)
    return piece


def _runs(model: nn.Module, batch: Any) -> Any:
    """``batch``, if the model runs on it."""
    try:
        with evaluating(model):
            call(model, batch)
    except (QuantkitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} does not run on the first calibration batch: {type(error).__name__}: {error}"
        ) from error
    return batch


def _masks(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The masks in a batch, by the names of the arguments of the model."""
    if isinstance(batch, Tensor):
        return {}
    named = batch if isinstance(batch, Mapping) else dict(zip(inspect.signature(model.forward).parameters, batch, strict=False))
    return {name: t for name, t in named.items() if "mask" in str(name) and isinstance(t, Tensor)}


def _kept(name: str, mask: Tensor) -> Tensor:
    """Which tokens a mask of this name leaves, in one of three conventions."""
    if mask.dtype == torch.bool and "padding" in name:
        return ~mask  # as nn.MultiheadAttention has it
    return mask >= 0 if (mask < 0).any() else mask != 0  # what is negative is added to scores


def _least_masked(masks: Mapping[str, Tensor], shape: torch.Size, tokens: int) -> tuple[int, int] | None:
    """The sample, and the place where its piece begins, of which the fewest tokens are masked, for ids of this ``shape``.

    None if all are masked in some mask, or a mask has more dimensions and says who may read whom.
    """
    width = min(tokens, shape[1])
    fewest = torch.full((shape[0], shape[1] - width + 1), width, dtype=torch.int64, device="cpu")
    for name, mask in masks.items():
        if mask.dim() > 2 and mask.shape[-1] == shape[1] > tokens:
            return None
        if mask.shape != shape:
            continue
        count = torch.nn.functional.pad(_kept(name, mask).cpu().long().cumsum(1), (1, 0))
        fewest = torch.minimum(fewest, count[:, width:] - count[:, : count.shape[1] - width])
    best = int(fewest.max())
    if best == 0:
        return None
    row, start = (fewest == best).nonzero()[0].tolist()
    return row, start
