"""``quantkit.export``: an INT8 model in the compressed-tensors layout, which inference engines load without a conversion.

The layout holds codes, one scale for each row, and perhaps one scale for the input of a layer. It knows nothing of what else a
layer of quantkit's may do to its input, nor of other bits than 8. What it cannot carry is refused before a byte is written, and
the message says what would work. Two ways around a refusal have to be asked for, because they round again.

Some readers cast scales to the dtype of the model and others do not. Scales are therefore rounded to numbers that bfloat16 can
hold, and in float16 models float16 too, so that all readers compute the same.

Tensors are converted and written one by one, so that a checkpoint is exported in the memory of its largest tensor.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit._version import __version__
from quantkit.checkpoint.files import FILE_NAME, as_one, check_target, files_of, inside, read_object, written_whole
from quantkit.checkpoint.record import RECORD_FILE
from quantkit.checkpoint.tensors import Entry, unshared, write_shards
from quantkit.core.errors import CheckpointError, ModelError
from quantkit.core.formats import Format, Int, PerChannel, PerTensor, Quantized, Storage
from quantkit.core.numerics import encode, qmax
from quantkit.core.report import Report, report
from quantkit.core.weights import quantize_weight
from quantkit.integrations.compressed.folder import INDEX, WEIGHTS, is_compressed
from quantkit.integrations.compressed.layout import METHOD, describe
from quantkit.integrations.folders import load
from quantkit.integrations.transformers.files import CONFIG, GENERATION_CONFIG, class_name
from quantkit.layers.attention import attention_quantizers
from quantkit.layers.linear import W8A8Linear
from quantkit.model.compiled import uncompiled
from quantkit.model.modules import is_conv1d, is_linear, linears_of

WHAT = "export of quantkit's"

log = logging.getLogger("quantkit")
HALF_FLOOR = 2.0**-17
"""From here on, float16 holds every number of eight significant bits, which is what bfloat16 has; below, it does not."""
ALIGNMENT = 16
"""CUTLASS, whose kernels vLLM uses for activations with zero points, takes sizes that are multiples of this."""


@torch.inference_mode(False)
@torch.no_grad()
def export(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str = METHOD,
    outliers: Literal["refuse", "drop"] = "refuse",
    rewrites: Literal["refuse", "undo"] = "refuse",
    tokenizer: Any = None,
    shard_bytes: int = 4 * 2**30,
) -> Path:
    """Write a quantized transformers model for vLLM, SGLang or transformers to the folder ``path``.

    Codes are written as they are. Scales of weights are rounded to the nearest bfloat16, which moves each by at most 2**-8 of
    itself, and so what a code stands for by less than half a step between codes: rounding the old weight with the new scale
    gives the same code. Static scales of inputs are rounded up, so that no value leaves their range.

    Args:
        model: what :func:`quantkit.quantize` or :func:`quantkit.load` returned, or the folder of a checkpoint, which is
            exported tensor by tensor, with its tokenizer.
        path: a folder that does not exist, is empty, or holds an export of quantkit's (which is replaced as a whole).
        format: ``"compressed-tensors"``.
        outliers: ``"drop"`` rounds the columns that LLM.int8() keeps in 16 bit to INT8 like the others, and leaves out
            thresholds.
        rewrites: ``"undo"`` takes the scales, shifts, permutations and rotations that a layer applies to its input at run
            time back into its weight, which is then rounded again.
        tokenizer: a transformers tokenizer to put beside the model.
        shard_bytes: largest size of one safetensors file, in bytes.

    Returns:
        The folder.

    Raises:
        ModelError: a layer holds what the layout cannot carry; says which, why, and what would work.
        CheckpointError: the target holds something else, or the source cannot be loaded.
    """
    if format != METHOD:
        raise ModelError(f"format={format!r} is not known: use {METHOD!r}")
    if outliers not in ("refuse", "drop") or rewrites not in ("refuse", "undo"):
        raise ModelError(f"outliers={outliers!r}, rewrites={rewrites!r}: use 'refuse', or 'drop' and 'undo'")
    target, extra = Path(path), dict[str, bytes]()
    check_target(target, _is_export, WHAT)
    if not isinstance(model, nn.Module):
        model, extra = as_one(source := Path(model), lambda: _opened(source, target))
    record = report(model := uncompiled(model))
    biased = _check(model, record, outliers == "drop", rewrites == "undo")
    config, generation = _configuration(model, record), getattr(model, "generation_config", None)
    entries = _entries(model, biased)
    del model  # entries hold what is still to be written, and let go of it one by one
    gc.collect()  # layers are part of cycles
    with written_whole(target, _is_export, WHAT, sum(entry.nbytes for entry in entries)) as folder:
        for name, content in extra.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if generation is not None:
            generation.save_pretrained(folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
        _write_tensors(entries, folder, shard_bytes)
    return target


def _write_tensors(entries: list[Entry], folder: Path, shard_bytes: int) -> None:
    """The tensors, and an index if they take more than one file."""
    total = sum(entry.nbytes for entry in entries)
    written = write_shards(entries, folder, shard_bytes, alone=WEIGHTS)
    if len(written) > 1:
        places = {name: file for file, names in written.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _opened(source: Path, target: Path) -> tuple[nn.Module, dict[str, bytes]]:
    """The model of a checkpoint, and what the files beside it hold that go along, by name."""
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target} is the checkpoint itself: choose another folder")
    model = load(source)
    names = [name for name in files_of(source) if FILE_NAME.fullmatch(name) and _is_text(source / name)]
    return model, {name: inside(source, name, RECORD_FILE).read_bytes() for name in names}


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an export of quantkit's, which may be replaced."""
    try:
        return is_compressed(folder) and "quantkit" in read_object(folder, CONFIG)["quantization_config"]
    except CheckpointError:
        return False


def _is_text(file: Path) -> bool:
    """Whether a file of a checkpoint goes along: tokenizer, chat template, processor."""
    ours = (RECORD_FILE, CONFIG, INDEX, GENERATION_CONFIG)
    return file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken") and file.name not in ours


# ---- what cannot be carried


def _check(model: Any, record: Report, drop: bool, undo: bool) -> set[str]:
    """Raise a ModelError for what an engine would compute differently, and warn of what some engines do not run.

    Returns:
        The INT8 layers that have a bias in an engine.
    """
    if class_name(model) is None:
        raise ModelError(
            f"{type(model).__name__} is no transformers model, and engines build models from config.json: use quantkit.save()"
        )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, W8A8Linear)}
    if not layers:
        raise ModelError("the model has no INT8 layer: quantize it with a scheme, such as 'w8a8'")
    if attention_quantizers(model):
        raise ModelError(
            f"the attention of this model is rounded as {record.scheme} says, a simulation that {METHOD} does not know: "
            "quantize with a scheme for linears only, 'w8a8'"
        )
    originals = dict(_without_weights(model).named_modules())  # no linears for experts that are one tensor there
    for name, layer in layers.items():
        reason = _why_not(layer, originals.get(name), drop, undo)
        if reason:
            raise ModelError(f"layer {name!r} cannot be exported to {METHOD}: {reason}")
    _check_sites(layers, record)
    _warn(layers, record)
    return {name for name, layer in layers.items() if layer.bias is not None and _has_bias(originals.get(name))}


def _has_bias(original: nn.Module | None) -> bool:
    return original is None or getattr(original, "bias", None) is not None


def _without_weights(model: Any) -> nn.Module:
    """The model as an engine will build it from ``config.json``, on the meta device."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh: nn.Module = type(model)(config)
    return fresh


def _why_not(layer: W8A8Linear, original: nn.Module | None, drop: bool, undo: bool) -> str | None:
    """Why the layout cannot carry a layer, as the rest of a sentence that names it; None if it can."""
    operand, scheme = layer.operand, layer.scheme
    rewrites = [step for step in operand.rewrite.steps if step not in ("outliers", "threshold")]
    outliers, threshold = operand.rewrite.outliers, operand.rewrite.threshold
    if original is not None and is_conv1d(original):
        return "it is a Conv1D, which engines store transposed, and their INT8 kernels do not expect that; use quantkit.save()"
    if not (_is_int8(operand.weight) and _is_int8(operand.input)):
        return f"{scheme.name} simulates other bits than 8, which its layout does not know; quantize with 8 bits, 'w8a8'"
    if operand.groups:
        return "its channels have scales by group, and the layout has one for all; quantize with scales per token, 'w8a8'"
    if threshold is not None and not drop:
        return (
            f"columns that reach {threshold:g} leave the INT8 product at run time; outliers='drop' rounds them like the "
            "others, and SmoothQuant needs no such columns"
        )
    if outliers is not None and not drop:
        return (
            f"{len(outliers)} outlier columns stay in 16 bit; outliers='drop' rounds them to INT8 like the others, "
            "and SmoothQuant needs no such columns"
        )
    if rewrites and not undo:
        return (
            f"its input is rewritten at run time ({', '.join(rewrites)}), since no layer before it could take that over; "
            "rewrites='undo' takes it back into the weight and rounds again, or leave the layer out with ignore= in quantize()"
        )
    if operand.bias is not None and not _has_bias(original) and operand.rewrite.shift is None:
        return "a shift gave it a bias, and its architecture has no place for one; quantize with a method that only scales"
    if operand.is_static and (rewrites or outliers is not None):
        return "its static scale holds for the rewritten input only; quantize with scales per token, 'w8a8'"
    return None


def _is_int8(format: Format) -> bool:
    return isinstance(format, Quantized) and format.number.bits == 8 and format.storage is Storage.BYTES


def _check_sites(layers: Mapping[str, W8A8Linear], record: Report) -> None:
    """Refuse layers that read one tensor with different static scales.

    Engines fuse such layers (q, k and v; gate and up), and keep one static scale for all of them.
    """
    sites: dict[str, list[str]] = {}
    for line in record.layers:
        if line.site is not None:
            sites.setdefault(line.site, []).append(line.name)
    for names in sites.values():
        int8 = [n for n in names if n in layers]
        first = layers[int8[0]] if int8 else None
        for name in int8[1:]:
            assert first is not None
            for key in ("input_scale", "input_zero_point"):
                a, b = getattr(first.operand, key), getattr(layers[name].operand, key)
                if a is not None and b is not None and not torch.equal(a, b):
                    raise ModelError(
                        f"layers {int8[0]!r} and {name!r} read one tensor and differ in {key}, and engines keep one for both; "
                        "quantize with scales per token, 'w8a8'"
                    )
        parents = {n.rpartition(".")[0] for n in int8}
        mixed = [n for n in names if n not in layers and n.rpartition(".")[0] in parents]
        if mixed:
            log.warning("%s is in floating point and %s is INT8: engines that fuse them refuse the mix", mixed[0], int8[0])


def _warn(layers: Mapping[str, W8A8Linear], record: Report) -> None:
    scheme = next(iter(layers.values())).scheme  # all layers have the same
    symmetric = isinstance(scheme.input, Quantized) and scheme.input.number.symmetric
    experts = any(".experts." in name for name in layers)
    if experts and (scheme.is_static or not symmetric):
        log.warning(
            "vLLM runs INT8 experts with symmetric scales per token only: %s will not be computed as it is", scheme.name
        )
    if symmetric:
        return
    odd = [n for n, m in layers.items() if m.in_features % ALIGNMENT or m.out_features % ALIGNMENT]
    if odd:
        log.warning("%s has sizes that are no multiples of 16: vLLM refuses those with zero points on a GPU", odd[0])


# ---- what is written


def _configuration(model: Any, record: Report) -> dict[str, Any]:
    from quantkit.integrations.transformers.names import checkpoint_names

    names = checkpoint_names(model)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    body: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    body.pop("_name_or_path", None)
    body["architectures"] = [type(model).__name__]
    # Always described as one scale for each row. The scheme may say one for the whole weight, but folding a scale of the next
    # layer into this one multiplies its rows, and so the scales of its rows, by different factors.
    rows = Quantized(Int(), PerChannel())
    schemes = {n: replace(m.scheme, weight=rows) for n, m in model.named_modules() if isinstance(m, W8A8Linear)}
    layers = {_source(names, name): scheme for name, scheme in schemes.items()}
    body["quantization_config"] = describe(layers, [_source(names, n) for n in _left_out(model)])
    body["quantization_config"]["quantkit"] = {"version": __version__, "method": record.method, "scheme": record.scheme}
    return dict(sorted(body.items()))


def _source(names: Mapping[str, str], module: str) -> str:
    return names[f"{module}.weight"].removesuffix(".weight")


def _left_out(model: nn.Module) -> list[str]:
    """Names of what stays in floating point: linears, and modules with a matrix that an engine may take for a linear.

    A router that holds its own matrix is one of the latter.
    """
    linears = linears_of(model)
    found = list(linears)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        other = isinstance(module, nn.Embedding) or name in linears or is_linear(module)
        if name and weight is not None and weight.dim() == 2 and not other:
            found.append(name)
    return found


def _entries(model: nn.Module, biased: set[str]) -> list[Entry]:
    from quantkit.integrations.transformers.names import checkpoint_names

    names = checkpoint_names(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, W8A8Linear)}
    half = any(p.dtype == torch.float16 for p in model.parameters())
    floats = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in layers}
    entries = []
    for name, tensor in unshared(floats)[0].items():
        entries.append(Entry.of(names[name], tensor))
    for name, layer in layers.items():
        entries += _layer_entries(_source(names, name), layer, half, name in biased)
    return entries


def _layer_entries(name: str, layer: W8A8Linear, half: bool, biased: bool) -> list[Entry]:
    operand = layer.operand
    codes, scale, bias = operand.codes, operand.scale, operand.bias if biased else None
    if layer.rewrites_input:
        plain = layer.to_float()
        per_tensor = isinstance(operand.weight.granularity, PerTensor)
        codes, scale = quantize_weight(plain.weight.detach(), per_tensor=per_tensor)
        bias = None if plain.bias is None or bias is None else plain.bias.detach().to(bias.dtype)
    stored = on_grid(scale, half)
    n, k = codes.shape
    made = [Entry(f"{name}.weight", torch.int8, (n, k), partial(_rounded, codes, scale, stored))]
    made.append(Entry.of(f"{name}.weight_scale", stored))
    if bias is not None:
        made.append(Entry.of(f"{name}.bias", bias))
    if operand.input_scale is not None:
        up = on_grid(operand.input_scale, half, up=True)
        made.append(Entry.of(f"{name}.input_scale", up))
    if operand.input_zero_point is not None:
        zero = operand.input_zero_point.to(torch.int8)
        made.append(Entry.of(f"{name}.input_zero_point", zero))
    return made


def on_grid(scale: Tensor, half: bool = False, *, up: bool = False) -> Tensor:
    """Positive scales, rounded to the nearest number that bfloat16 holds.

    Args:
        scale: of any shape and floating-point dtype.
        half: round to numbers that float16 holds too, for models in that dtype.
        up: round to the next larger number instead of the nearest.

    Returns:
        The rounded scales in float32.
    """
    near = scale.float().clamp_min(HALF_FLOOR if half else 0.0)
    grid = near.bfloat16().float()
    if up:
        above = (grid.view(torch.int32) + 0x10000).view(torch.float32)  # the next bfloat16, of a positive number
        grid = torch.where(grid < near, above, grid)
    return grid


def _rounded(codes: Tensor, scale: Tensor, stored: Tensor) -> Tensor:
    """The codes that go with the scales that are written: the same ones, except in rows whose scale had to grow for float16."""
    grown = (stored > scale * 1.01).view(-1)
    if not bool(grown.any()):
        return codes
    codes = codes.clone()
    codes[grown] = encode(codes[grown].float() * scale[grown], stored[grown] * float(qmax(8)))
    return codes
