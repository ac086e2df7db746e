"""Reading a checkpoint: a folder is looked at first, and then a model is filled with what it holds.

:func:`open_checkpoint` reads the record and the headers and refuses whatever is damaged, without any model. :func:`fill` takes
a fresh model in floating point. It compares every name, shape and type with what the model needs before it changes anything,
so that a checkpoint of another model leaves this one as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.files import inside, sha256_of
from quantkit.checkpoint.record import RECORD_FILE, check_cast_buffers, empty_layer, empty_quantizers, read_record
from quantkit.checkpoint.rerun import CHECK_FILE, Check, read_check
from quantkit.checkpoint.tensors import read_tensors
from quantkit.core.errors import CheckpointError, ModelError, QuantkitError
from quantkit.core.report import Report, attach
from quantkit.layers.attention import CHILD, AttentionQuantizer, attach_attention
from quantkit.layers.linear import W8A8Linear
from quantkit.model.experts import put_back, unfuse
from quantkit.model.modules import all_names, linears_of, parents_of, replace_module, weight_of
from quantkit.model.ties import tied_to_embeddings, untie


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been looked at.

    Attributes:
        folder: where it is.
        record: what its ``quantkit.json`` says, keys of others included.
        report: what was done to the model.
        tensors: all that its files hold, by name. Their memory is that of the files, which are read when it is used.
        check: what the saved model said; None if that is not known.
    """

    folder: Path
    record: dict[str, Any]
    report: Report
    tensors: dict[str, Tensor]
    check: Check | None


def open_checkpoint(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Look at a checkpoint, and map its tensors into memory. Whoever replaces it meanwhile: see :func:`as_one`.

    Args:
        folder: where it is.
        verify: compare the SHA-256 of every file, which reads all of them once.

    Raises:
        CheckpointError: it is missing, truncated, changed, of a newer format, or not safe.
    """
    record = read_record(folder)
    for name, facts in record["files"].items():
        file = inside(folder, name, RECORD_FILE)
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes and should have {facts['bytes']}: truncated or changed"
            )
        if verify and sha256_of(file) != facts["sha256"]:
            raise CheckpointError(f"{file} was changed after it was written (its SHA-256 does not match)")
    weights = [name for name in record["files"] if name.endswith(".safetensors") and name != CHECK_FILE]
    tensors = _two_axes(read_tensors(folder, weights), record["layers"])
    try:
        report = Report.from_dict(record["report"])
    except (TypeError, KeyError, AttributeError, QuantkitError) as error:
        raise CheckpointError(f"{folder / RECORD_FILE} is damaged: its report cannot be read ({error})") from None
    return Checkpoint(folder, record, report, tensors, read_check(folder, record))


def fill(model: nn.Module, checkpoint: Checkpoint, device: torch.device | str) -> nn.Module:
    """Put the layers and tensors of a checkpoint into a fresh model, in place.

    Args:
        model: in floating point and of the same architecture. It may be on the meta device. Nothing is changed if the
            checkpoint does not fit.
        checkpoint: what to put in.
        device: where the model shall be.

    Returns:
        The same model in eval mode.

    Raises:
        CheckpointError: the checkpoint is of another model, or a record makes no sense.
        ModelError: the model is quantized already.
    """
    if any(isinstance(m, W8A8Linear) for m in model.modules()):
        raise ModelError("model= is quantized already: pass a fresh floating-point instance")
    record, tensors = checkpoint.record, checkpoint.tensors
    tied, cast = record["tied"], record.get("cast", {})
    taken_apart = unfuse(model, only=record["layers"])
    try:
        layers = _empty_layers(model, record["layers"], tensors)
        quantizers = empty_quantizers(model, record.get("attention", {}), layers)
        names = all_names(model, [*layers, *quantizers])
        added: dict[str, W8A8Linear | AttentionQuantizer] = {
            other: layer for name, layer in layers.items() for other in names[name]
        }
        for name, quantizer in quantizers.items():
            added |= {f"{other}.{CHILD}".removeprefix("."): quantizer for other in names[name]}
        _check_fit(model, added, tensors, tied)
        check_cast_buffers(model, cast)
    except BaseException:
        put_back(model, taken_apart)
        raise
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    tensors |= {alias: tensors[name] for alias, name in tied.items()}
    for name, module in added.items():
        if fault := module.damage_in({key: tensors[f"{name}.{key}"] for key in module.state_dict()}):
            put_back(model, taken_apart)
            raise CheckpointError(f"{name!r} is damaged: {fault}")
    untie(model, [name for name in tied_to_embeddings(model) if name in layers], ExitStack())
    parents = parents_of(model)
    for name, layer in layers.items():
        replace_module(model, name, layer, parents)
    attach_attention(model, quantizers)
    model.load_state_dict(tensors, strict=True, assign=True)
    for name, dtype in cast.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_buffer(name).to(getattr(torch, dtype)))
    retie: Any = getattr(model, "tie_weights", None)  # tensors that were assigned one by one are equal, and not yet one
    if retie is not None:
        retie()
    model.to(device)
    attach(model, checkpoint.report)
    return model.eval()


def _two_axes(tensors: dict[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """What the files hold, without the third axis that codes have there."""
    codes = {f"{name}.weight" for name in layers}
    return {name: t.flatten(1) if name in codes and t.shape[2:] == (1,) else t for name, t in tensors.items()}


def _empty_layers(model: nn.Module, records: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, W8A8Linear]:
    """The INT8 layers of the record, each in the size of the linear that it will replace."""
    linears, layers = linears_of(model, untried=True), {}
    pairs = [(p.dtype, tensors[name].dtype) for name, p in model.named_parameters() if name in tensors]
    # what becomes of the first parameter of a dtype, and so of linears
    loaded = {old: new for old, new in reversed(pairs) if new.is_floating_point}
    for name, facts in records.items():
        if name not in linears:
            raise CheckpointError(
                f"the checkpoint quantizes {name!r}, and the model has no such linear: it is of another model"
            )
        n, k = facts["out_features"], facts["in_features"]
        if tuple(weight_of(linears[name]).shape) != (n, k):
            raise CheckpointError(f"layer {name!r} has {k} inputs and {n} outputs, and in the model it has other sizes")
        layers[name] = empty_layer(name, facts, loaded.get(dtype := weight_of(linears[name]).dtype, dtype))
    return layers


def _check_fit(
    model: nn.Module, added: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], tied: Mapping[str, str]
) -> None:
    """Raise a CheckpointError unless exactly the tensors that the model needs are stored, each in its shape and type.

    ``added`` are modules that will be put into the model, by name; their tensors count in place of those that are there now.
    """
    wanted = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in added}
    scales = set()
    for name, module in added.items():
        own = {f"{name}.{key}": t for key, t in module.state_dict().items()}
        wanted |= own
        # The C passes read these as they are, so nothing but float32 will do.
        scales |= {key for key, t in own.items() if t.is_floating_point() and not key.endswith((".bias", ".outlier_weight"))}
    for name, tensor in wanted.items():
        source = tied.get(name, name)
        if source not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing from the checkpoint")
        found = tensors[source]
        if found.shape != tensor.shape:
            raise CheckpointError(f"tensor {name!r} has shape {list(found.shape)} and the model needs {list(tensor.shape)}")
        fits = found.is_floating_point() if tensor.is_floating_point() else found.dtype == tensor.dtype
        if not fits or (name in scales and found.dtype != torch.float32):
            wanted_dtype = torch.float32 if name in scales else tensor.dtype
            raise CheckpointError(f"tensor {name!r} is {found.dtype} and should be {wanted_dtype}")
    surplus = next((name for name in [*tensors, *tied] if name not in wanted), None)
    if surplus is not None:
        raise CheckpointError(f"the checkpoint holds {surplus!r}, which the model has no place for: it is of another model")
