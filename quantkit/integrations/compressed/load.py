"""INT8 checkpoints in the compressed-tensors layout, run by :class:`quantkit.W8A8Linear` in transformers.

By itself, transformers hands such a checkpoint to the package compressed-tensors, which turns the weights back into 16 bit at
the first forward. Inside :func:`quantkit.compressed_tensors_as_int8` this quantizer takes the place of that one. It looks at
the headers of all files and checks the values of all scales before a weight is read, and puts INT8 layers where the files
have codes. transformers reads the files; what it returns is a model of quantkit's like any other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantkit.checkpoint.tensors import Stored, read_header, read_tensor
from quantkit.core.errors import CheckpointError
from quantkit.core.formats import PerTensor, Quantized
from quantkit.core.report import LayerRecord, Report, attach
from quantkit.core.scheme import Scheme
from quantkit.core.validity import value_fault
from quantkit.integrations.compressed.layout import METHOD, parse
from quantkit.integrations.transformers.files import model_class
from quantkit.integrations.transformers.names import checkpoint_names
from quantkit.integrations.transformers.quantizer import NOT_STORED, QuantKitConfig, QuantKitQuantizer, mark
from quantkit.layers.linear import W8A8Linear
from quantkit.model.experts import unfuse
from quantkit.model.modules import is_conv1d, linears_of, parents_of, replace_module, weight_of
from quantkit.pipeline.account import account

log = logging.getLogger("quantkit")


class CompressedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a checkpoint in this layout, and what it means.

    Raises:
        CheckpointError: it asks for what quantkit cannot run.
    """

    def __init__(self, **config: Any) -> None:
        self.quant_method = METHOD
        self.meaning = parse({**config, "quant_method": METHOD})


class CompressedQuantizer(QuantKitQuantizer):
    """Puts INT8 layers in place before the weights are read, once the headers of all files make sense."""

    def __init__(self, quantization_config: CompressedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._meaning = quantization_config.meaning
        self._schemes: dict[str, Scheme] = {}

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Do nothing yet: whether experts are taken apart depends on the files, which are only known later."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError("quantkit makes no such checkpoint while it loads one: see quantkit.export()")
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointError("the weights are in no safetensors files: refused")
        stored: dict[str, Stored] = {}
        for file in checkpoint_files:
            stored |= read_header(Path(file))
        schemes, names = self._layers_to_run(model, stored)
        for name, tensor in model.state_dict().items():  # not every version of transformers compares shapes
            found = stored.get(names[name])
            if name.rpartition(".")[0] not in schemes and found is not None and found.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"tensor {names[name]!r} has shape {list(found.shape)} and the model needs {list(tensor.shape)}"
                )
        linears = dict(model.named_modules())
        made = {}
        for name, scheme in schemes.items():
            if is_conv1d(linears[name]):
                raise CheckpointError(f"layer {name!r} is a Conv1D, whose INT8 layout is not settled: refused")
            source = names[f"{name}.weight"].removesuffix(".weight")
            made[name] = _empty(name, source, linears[name], scheme, stored, model.dtype)
        parents = parents_of(model)
        for name, layer in made.items():
            replace_module(model, name, layer, parents)
        self._schemes = schemes

    def _layers_to_run(self, model: Any, stored: dict[str, Stored]) -> tuple[dict[str, Scheme], dict[str, str]]:
        """The number format of each linear that is INT8, and what the files call the tensors of the model.

        If the files have experts apart, with a scale for each, those of the model are taken apart first.
        """
        if any(re.search(r"\.experts\.\d+\..*weight_scale$", name) for name in stored):
            super()._convert_model_for_quantization(model)
            self._apart = bool(unfuse(model, only=[f"{name}." for name, _ in model.named_modules()]))
        names = checkpoint_names(model)
        schemes = {}
        for name, linear in _candidates(model, names, stored).items():
            source = names[f"{name}.weight"].removesuffix(".weight")
            scheme = self._meaning.scheme_of({name: None, source: None}, linear)
            if scheme is None and f"{source}.weight_scale" in stored:
                raise CheckpointError(f"{source!r} has a weight_scale, and quantization_config does not quantize it")
            if scheme is not None:
                schemes[name] = scheme
        if not schemes:
            raise CheckpointError("quantization_config quantizes no linear of this model")
        return schemes, names

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name in self._schemes:
            layer = model.get_submodule(name)
            rows = layer.weight_scale.detach().view(-1, 1)
            layer.weight_scale = rows.expand(layer.out_features, 1).contiguous()
            for key, dtype in (("input_scale", torch.float32), ("input_zero_point", torch.int32)):
                if getattr(layer, key) is not None:
                    setattr(layer, key, getattr(layer, key).detach().view(1).to(dtype))
            if fault := value_fault(layer.operand):
                raise CheckpointError(f"layer {name!r}: {fault}: its files are damaged")
        # From here on the model is one of quantkit's own, so that save_pretrained writes quantkit's format.
        record = Report([METHOD], max(s.name for s in self._schemes.values()), 0, "by whoever made the checkpoint")
        record.layers = [LayerRecord(name, "int8") for name in self._schemes]
        record.layers += [LayerRecord(name, "float", reason=NOT_STORED) for name in linears_of(model)]
        account(model, record)
        own = QuantKitConfig(record.method, str(record.scheme), layers={name: {} for name in self._schemes})
        model.hf_quantizer = QuantKitQuantizer(own, pre_quantized=True)
        attach(model, record)
        mark(model, own)
        return model


def _candidates(model: nn.Module, names: dict[str, str], stored: dict[str, Stored]) -> dict[str, nn.Module]:
    """The modules that may be INT8: linears, and subclasses of ``nn.Linear`` of which the files have codes.

    The latter may have a forward of their own, which cannot be tried before there are weights.
    """
    found = linears_of(model)
    for name, module in model.named_modules():
        if name not in found and isinstance(module, nn.Linear):
            source = names[f"{name}.weight"].removesuffix(".weight")
            if f"{source}.weight_scale" in stored:
                found[name] = module
    return found


def longest(scheme: Scheme) -> int:
    """The largest number of input channels for which int32 sums are exact.

    It is smaller than for layers that quantkit made, because the codes of other tools reach -128.
    """
    assert isinstance(scheme.input, Quantized)
    return (2**31 - 1) // (128 * scheme.input.number.reach)


def _empty(name: str, source: str, linear: nn.Module, scheme: Scheme, stored: dict[str, Stored], dtype: Any) -> W8A8Linear:
    """An INT8 layer on the meta device whose buffers have the shapes that the files have.

    Args:
        name, source: what the layer is called in the model and in the files.
        linear: the linear in floating point that it will replace.
        scheme: its number format.
        stored: every tensor that the files hold.
        dtype: of the bias.

    Raises:
        CheckpointError: a tensor is missing, surplus, of a wrong shape or type, or holds scales that are none.
    """
    n, k = weight_of(linear).shape
    if k > longest(scheme):
        raise CheckpointError(f"layer {name!r} has {k} inputs, beyond {longest(scheme)}, up to which its int32 sums are exact")
    assert isinstance(scheme.input, Quantized)
    zero = scheme.is_static and not scheme.input.number.symmetric
    scale_shapes = [(1,), (1, 1), ()] if isinstance(scheme.weight.granularity, PerTensor) else [(n, 1), (n,)]
    wanted: dict[str, tuple[list[tuple[int, ...]], tuple[str, ...]]] = {
        "weight": ([(n, k)], ("I8",)),
        "weight_scale": (scale_shapes, ("F32", "BF16", "F16")),
        **({"input_scale": ([(1,), ()], ("F32", "BF16", "F16"))} if scheme.is_static else {}),
        **({"input_zero_point": ([(1,), ()], ("I8",))} if zero else {}),
    }
    for key, (shapes, types) in wanted.items():
        found = stored.get(f"{source}.{key}")
        if found is None:
            raise CheckpointError(f"tensor '{source}.{key}' is missing from the checkpoint")
        if found.shape not in shapes or found.dtype not in types:
            raise CheckpointError(
                f"tensor '{source}.{key}' is {found.dtype} {list(found.shape)} and should be {' or '.join(types)} "
                f"{' or '.join(str(list(shape)) for shape in shapes)}"
            )
        if key != "weight":
            _check_values(f"{source}.{key}", found)
    points = stored.get(f"{source}.weight_zero_point")
    if points is not None and bool(read_tensor(points.file, f"{source}.weight_zero_point").any()):
        raise CheckpointError(f"layer {name!r} has zero points in its weight: asymmetric weights are not in an INT8 product")
    static = ("input_scale", "input_zero_point")
    surplus = next((key for key in static if key not in wanted and f"{source}.{key}" in stored), None)
    if surplus is not None:
        raise CheckpointError(f"'{source}.{surplus}' is stored, and quantization_config has no place for it")
    if (f"{source}.bias" in stored) != (linear.bias is not None):
        raise CheckpointError(f"layer {name!r} has a bias in the model or in the checkpoint, and not in both")
    layer = W8A8Linear(k, n, scheme=scheme, bias=linear.bias is not None, device="meta", dtype=dtype)
    for key in wanted:
        like = getattr(layer, key)
        setattr(layer, key, torch.empty(stored[f"{source}.{key}"].shape, dtype=like.dtype, device="meta"))
    return layer


def _check_values(name: str, found: Stored) -> None:
    """Raise a CheckpointError if scales, which are floating-point numbers, are negative or not finite."""
    if found.dtype.startswith("I"):
        return
    values = read_tensor(found.file, name).float()
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise CheckpointError(f"tensor {name!r} holds a scale that is negative or not finite")


@contextmanager
def replaced() -> Iterator[None]:
    """Inside, the tables of transformers have this file's configuration and quantizer for compressed-tensors."""
    tables: list[tuple[dict[str, Any], Any]] = [
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, CompressedConfig),
        (auto.AUTO_QUANTIZER_MAPPING, CompressedQuantizer),
    ]
    before = [table.get(METHOD) for table, _ in tables]
    for table, ours in tables:
        table[METHOD] = ours
    try:
        yield
    finally:
        for (table, _), old in zip(tables, before, strict=True):
            if old is None:
                table.pop(METHOD, None)
            else:
                table[METHOD] = old


def load_compressed(folder: Path, name: str, device: torch.device | str) -> nn.Module:
    """The model of a folder that has been looked at, with every tensor that it needs.

    Args:
        folder: where it is.
        name: of the class of the model.
        device: where the model shall be.

    Raises:
        CheckpointError: transformers cannot load it, or did not find a tensor.
    """
    cls = model_class(folder, name)
    try:
        with replaced():
            model, info = cls.from_pretrained(
                folder, dtype="auto", device_map=str(device), local_files_only=True, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except Exception as error:  # whatever transformers makes of files that it did not write
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise CheckpointError(f"{folder}: {what.replace('_', ' ')}: {min(map(str, info[what]))}")
    if info.get("unexpected_keys"):
        log.warning("%s: tensors that the model has no place for: %s", folder, ", ".join(sorted(info["unexpected_keys"])[:5]))
    result: nn.Module = model
    return result
