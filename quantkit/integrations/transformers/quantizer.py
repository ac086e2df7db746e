"""quantkit as a quantizer of transformers: ``from_pretrained(path, quantization_config=quantkit.QuantKitConfig(...))``.

transformers asks a quantizer of the method that ``config.json`` or the caller names. It is called with the empty model before
the weights are read, to put other modules in place; with every tensor that is read, to convert it; and with the finished
model. Here that means one of three things. A saved model gets empty INT8 layers, which take the codes from the files as they
are. Methods that need no data round each weight when it has been read, so that the model is never whole in floating point.
All other methods let transformers load the model and then call :func:`quantkit.quantize`.

Nothing happens when this file is imported; :func:`quantkit.register_with_transformers` enters it into the tables of
transformers. Tested from transformers 5.17 on, whose hooks for quantizers still move: what is overridden here takes the
arguments of all versions.

One file because configuration and quantizer are a pair for transformers, and each reads what the other keeps for itself.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationConfigMixin

from quantkit.calibrators import RTN, LLMInt8, resolve
from quantkit.checkpoint.record import (
    FORMAT_VERSION,
    attention_records,
    check_version,
    codes_apart,
    empty_layer,
    empty_quantizers,
    layer_records,
    rounds_attention,
    upgraded,
    version_of,
)
from quantkit.core.errors import CheckpointError, MethodError, ModelError
from quantkit.core.facts import Facts, check_exact
from quantkit.core.operand import empty_operand
from quantkit.core.report import LayerRecord, Report, attach, detach, has_report, report
from quantkit.core.scheme import Scheme
from quantkit.core.sites import Kept
from quantkit.core.weights import round_weight
from quantkit.integrations.transformers.checksums import checksums, compare
from quantkit.integrations.transformers.names import one_by_one, splits_buffers
from quantkit.layers.attention import AttentionQuantizer, attach_attention, attention_quantizers, detach_attention, explained
from quantkit.layers.linear import W8A8Linear
from quantkit.model.experts import Experts, is_fused, unfuse
from quantkit.model.modules import Parents, is_conv1d, linears_of, lookalikes_of, parents_of, replace_module, weight_of
from quantkit.model.targets import IGNORED, asked_in_float32, matches
from quantkit.pipeline.account import HEAD_OR_TIED, account, say
from quantkit.pipeline.quantize import quantize

log = logging.getLogger("quantkit")
NAME = "quantkit"
OPTIONAL = ("attention", "checksums", "heads")
"""What ``config.json`` has only where there is any."""
NOT_STORED = "not quantized in the checkpoint"
NOT_TRIED = (
    "its class has a forward of its own, which cannot be tried before it has a weight: load it as it is, and call quantize()"
)


class QuantKitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``from_pretrained`` shall do, and what ``save_pretrained`` writes into ``config.json``.

    Two methods need no data, so that weights are rounded one by one while they are read: ``"rtn"``, and ``"llm_int8"`` by
    itself, which means the paper's method with its threshold here. Other methods, lists of several, and any with ``heads``
    first load the model whole.

    The arguments are the keys in ``config.json``. The last four are for models that were saved; nobody writes them by hand.

    Args:
        method: as in :func:`quantkit.quantize`: a name, a calibrator, or a list of them.
        scheme: name of the number formats, such as ``"w8a8"``.
        ignore: names, parts of names or globs of linears that stay in floating point, besides output heads and tied weights.
        heads: quantize output heads too, as in :func:`quantkit.quantize`.
        threshold: for ``"llm_int8"``: columns of the activation with an element of this magnitude or more are not rounded; 6.0
            as in the paper.
        calibration, tokenizer: as in :func:`quantkit.quantize`, for methods that need data; left out, a causal language model
            samples its own. They are not saved.
        seed: seed of everything that is drawn at random.
        layers: the record of every INT8 layer of a saved model, by name.
        attention: the record of every module whose attention is rounded, by name, if there is any.
        format_version: version of these records.
        checksums: what :func:`~quantkit.integrations.transformers.checksums.checksums` said of the saved model.

    Raises:
        MethodError, SchemeError: for what :func:`quantkit.quantize` would refuse.
        CheckpointError: the records are of a version that is not known, or damaged.
    """

    def __init__(
        self,
        method: Any = "llm_int8",
        scheme: str = "w8a8",
        *,
        ignore: Sequence[str] = (),
        heads: bool = False,
        threshold: float = 6.0,
        calibration: Any = None,
        tokenizer: Any = None,
        seed: int = 0,
        layers: dict[str, dict[str, Any]] | None = None,
        attention: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        checksums: dict[str, dict[str, str]] | None = None,
        **unknown: Any,
    ) -> None:
        # One function because these are the keys of a quantization_config.
        unknown.pop("quant_method", None)
        if unknown:
            log.warning("QuantKitConfig: %s not known to this quantkit, and left alone", ", ".join(unknown))
        check_version("the model", format_version)
        self.quant_method = NAME
        if layers:
            layers = upgraded(layers, format_version)
        if bool(attention) != rounds_attention(format_version):
            raise CheckpointError("the model's config.json is damaged: 'attention' does not go with its format version")
        self._read_version, self.format_version, self.attention = format_version, version_of(attention), attention
        self.scheme = Scheme.parse(scheme).name
        self.ignore, self.threshold, self.seed, self.layers = list(ignore), threshold, seed, layers
        self.checksums, self.heads = checksums, heads
        self._calibration, self._tokenizer = calibration, tokenizer
        parts = list(method) if isinstance(method, (list, tuple)) else [method]
        self._calibrators, self.method = [], parts
        if not layers:  # the methods of a saved model have done their work, and may be somebody's own
            self._calibrators = resolve([LLMInt8(threshold=threshold)] if parts == ["llm_int8"] else parts)
            self.method = [c.name for c in self._calibrators]

    @classmethod
    def from_bitsandbytes(cls, config: BitsAndBytesConfig) -> QuantKitConfig:
        """The configuration that does what ``BitsAndBytesConfig(load_in_8bit=True, ...)`` asks for.

        Raises:
            MethodError: it asks for 4 bits.
        """
        if not config.load_in_8bit:
            raise MethodError("this BitsAndBytesConfig does not say load_in_8bit=True: quantkit has no 4-bit weights")
        if config.llm_int8_has_fp16_weight or config.llm_int8_enable_fp32_cpu_offload:
            log.warning("llm_int8_has_fp16_weight and llm_int8_enable_fp32_cpu_offload have no counterpart and are left out")
        threshold = config.llm_int8_threshold
        options: dict[str, Any] = {"method": "llm_int8", "threshold": threshold} if threshold else {"method": "rtn"}
        return cls(ignore=config.llm_int8_skip_modules or (), **options)

    @property
    def streams(self) -> bool:
        """Whether weights can be rounded while they are read: nothing has to be known of the model."""
        scheme = Scheme.parse(self.scheme)
        if self.heads or scheme.quantizes_attention or scheme.norm_input is not None:
            return False
        return all(isinstance(c, RTN) or (isinstance(c, LLMInt8) and c.threshold) for c in self._calibrators)

    def to_dict(self) -> dict[str, Any]:
        """What is written into ``config.json``, in plain JSON types: all but the calibration data and the tokenizer."""
        names = {name for name, value in vars(self).items() if not name.startswith("_") and (value or name not in OPTIONAL)}
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if name in names}

    def __deepcopy__(self, memo: Any) -> QuantKitConfig:
        new = copy.copy(self)  # transformers copies configs again and again; data, perhaps a generator, is not to be copied
        new.__dict__.update(self.to_dict())
        return new


class RoundToNearest(ConversionOps):  # type: ignore[misc]
    """The conversion of a weight that has just been read to its codes and scales."""

    def __init__(self, quantizer: QuantKitQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        (name, value), *_ = input_dict.items()
        weight: Tensor = value[0] if isinstance(value, list) else value
        name = full_layer_name or name
        layer = name.removesuffix(".weight")
        if layer in self.hf_quantizer.transposed:
            weight = weight.t()
        if not weight.isfinite().all():
            raise ModelError(f"the weight of {layer!r} holds NaN or Inf: the checkpoint is damaged, or was overflowing")
        own = Scheme.parse(self.hf_quantizer.quantization_config.scheme).weight
        codes, scale = round_weight(weight, own)
        if missing_keys is not None:
            missing_keys.discard(f"{layer}.weight_scale")
        return {name: codes, f"{layer}.weight_scale": scale}


class QuantKitQuantizer(HfQuantizer):  # type: ignore[misc]
    """The hooks that ``from_pretrained`` and ``save_pretrained`` call.

    Attributes:
        quantization_config: what to do.
        transposed: names of the INT8 layers whose weights are stored ``[K, N]``, since they were a ``Conv1D``.
    """

    requires_calibration = False
    quantization_config: QuantKitConfig
    quantized_element_size = 1.0

    def __init__(self, quantization_config: QuantKitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.transposed: set[str] = set()
        self._kept: dict[str, str] = {}
        self._checksums: dict[str, Any] = {}
        self._apart = False  # whether all experts have been taken apart, because the files have them apart

    def update_tp_plan(self, config: Any) -> Any:
        return config

    def update_ep_plan(self, config: Any) -> Any:
        return config

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Experts that were taken apart are read one by one, and weights that files join can be split into codes."""
        conversions = [splits_buffers(c) for c in weight_conversions]
        return [r for c in conversions for r in (one_by_one(c) if self._apart else [c])]

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        return 1.0 if self.param_needs_quantization(model, param_name) else param.element_size()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        where = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in where:
            raise ModelError("device_map puts layers on the disk: INT8 layers have to be in memory; leave 'disk' out")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        layer, _, name = param_name.rpartition(".")
        return not self.pre_quantized and name == "weight" and isinstance(model.get_submodule(layer), W8A8Linear)

    def get_quantize_ops(self) -> RoundToNearest:
        return RoundToNearest(self)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            self._expect_int8(model)
        elif config.streams:
            self._expect_float(model)

    def _expect_int8(self, model: Any) -> None:
        """Put empty INT8 layers where the saved model has them; the files hold their codes."""
        config, records = self.quantization_config, self.quantization_config.layers
        if not records:
            raise CheckpointError(
                "config.json does not say which layers quantkit quantized: open the model with quantkit.load()"
            )
        names = _names_in(model, records)
        records, attention = _moved(records, *names), _moved(config.attention or {}, *names)
        self._checksums = _moved(config.checksums or {}, *names)
        self._apart = bool(unfuse(model, only=records)) and not any(is_fused(module) for module in model.modules())
        linears, parents = linears_of(model, untried=True), parents_of(model)
        for name, record in records.items():
            if name not in linears:
                raise CheckpointError(f"config.json has an INT8 layer {name!r}, and the model has no such linear")
            layer = empty_layer(name, record, weight_of(linears[name]).dtype)
            if config._read_version >= FORMAT_VERSION:  # the shape of the file, until it has been read
                layer.weight = layer.weight.unsqueeze(-1)
            replace_module(model, name, layer, parents)
        attach_attention(model, empty_quantizers(model, attention, records))
        _spare(model)

    def _expect_float(self, model: Any) -> None:
        """Put INT8 layers in place whose weights arrive in floating point and are rounded then."""
        config = self.quantization_config
        scheme, dtype = Scheme.parse(config.scheme), model.dtype
        if scheme.is_static:
            raise MethodError(f"scheme {config.scheme!r} needs data for its static scales: give a method that reads data")
        threshold = next((float(c.threshold) for c in config._calibrators if isinstance(c, LLMInt8) and c.threshold), 0.0)
        if threshold and not scheme.takes_threshold:
            raise MethodError(
                f"a threshold goes with activations that have symmetric scales, and not with {config.scheme!r}: take 'w8a8', "
                "or method='rtn'"
            )
        linears, lookalikes = linears_of(model), lookalikes_of(model)
        for pattern in config.ignore:
            if not any(matches(name, linear, pattern) for name, linear in linears.items()):
                log.warning("ignore: %r matches no linear of the model", pattern)
        parents = parents_of(model)
        heads, float32 = self.get_modules_to_not_convert(model), asked_in_float32(model, linears)
        for name, linear in linears.items():
            if any(matches(name, linear, head) for head in heads):
                self._kept[name] = HEAD_OR_TIED
            elif name in float32:
                self._kept[name] = Kept.FLOAT32
            elif any(matches(name, linear, pattern) for pattern in config.ignore):
                self._kept[name] = IGNORED
            else:
                self._replace(model, name, linear, scheme, dtype, threshold, parents)
        if self._kept.keys() == linears.keys():
            others = "".join(f"; {name}: {reason}" for name, reason in list(lookalikes.items())[:1])
            raise ModelError(f"no linear is left to quantize: all are output heads, tied, or ignored{others}")
        self._kept |= lookalikes
        _spare(model)

    def _replace(
        self, model: Any, name: str, linear: Any, scheme: Scheme, dtype: torch.dtype, threshold: float, parents: Parents
    ) -> None:
        k, n = linear.weight.shape if is_conv1d(linear) else linear.weight.shape[::-1]
        check_exact(k, scheme.input, name)
        if is_conv1d(linear):
            self.transposed.add(name)
        facts = Facts(k, n, scheme, threshold=threshold or None)
        layer = W8A8Linear.from_operand(empty_operand(facts, bias=linear.bias is not None, device="meta", dtype=dtype), dtype)
        # A stand-in in floating point and in the shape of the file: transformers up to 5.22 casts a weight to the dtype of
        # what it will replace before it is rounded.
        layer.weight = torch.empty(linear.weight.shape, dtype=dtype, device="meta")
        replace_module(model, name, layer, parents)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        for name, layer in model.named_modules():
            if not isinstance(layer, W8A8Linear):
                continue
            if self.pre_quantized and not getattr(layer.weight, "_is_hf_initialized", False):
                raise CheckpointError(f"the files hold no codes for layer {name!r}: they are of another model, or damaged")
            if layer.weight.dim() == 3:
                layer.weight = layer.weight.flatten(1)
        if self.pre_quantized:
            _check_values(model)
            compare(model, self._checksums)
        if not self.pre_quantized and not config.streams:
            quantize(
                model, config._calibrators, calibration=config._calibration, tokenizer=config._tokenizer, scheme=config.scheme,
                ignore=config.ignore, heads=config.heads, seed=config.seed,
            )  # fmt: skip
        elif not has_report(model):
            layers = [
                LayerRecord(name, "int8", at_run_time=["threshold"] if m.threshold else [])
                for name, m in model.named_modules()
                if isinstance(m, W8A8Linear)
            ]
            kept = dict.fromkeys(linears_of(model), NOT_STORED if self.pre_quantized else NOT_TRIED) | self._kept
            layers += [LayerRecord(name, "float", reason=reason) for name, reason in kept.items()]
            record = Report(config.method, config.scheme, config.seed, "not needed")
            record.layers, record.rewrites = layers, explained(attention_quantizers(model))
            account(model, record, config.ignore)
            attach(model, record)
            if not self.pre_quantized:
                say(record)
        mark(model, config)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes, also that of a part of a quantized model, whose layers have other names."""
        mark(model, config := copy.copy(self.quantization_config))
        config.checksums = checksums(model)
        return codes_apart(model, model.state_dict()), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top; gradients flow through to inputs

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        parents = parents_of(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, W8A8Linear):
                replace_module(model, name, layer.to_float(dtype or model.dtype), parents)
        detach_attention(model)
        detach(model)
        return model


def _check_values(model: Any) -> None:
    """Raise a CheckpointError if what was read makes no sense."""
    for name, module in model.named_modules():
        if isinstance(module, W8A8Linear | AttentionQuantizer):
            held = {key: tensor for key, tensor in module.named_buffers(recurse=False) if tensor is not None}
            if fault := module.damage_in(held):
                raise CheckpointError(f"{name!r}: {fault}: its files are damaged")


def _spare(model: Any) -> None:
    """Tell transformers to leave INT8 layers alone, and experts that were taken apart.

    It initializes every module of a model of which something was missing in the files. The code that does so knows float
    weights, and reaches from a block into its experts. It also looks for parameters of layers that are one object under two
    names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = {name for name, module in modules.items() if isinstance(module, W8A8Linear)}
    experts = {name for name, module in modules.items() if isinstance(module, Experts)}
    for name in inside | experts | {name.rpartition(".")[0] for name in experts}:
        modules[name]._is_hf_initialized = True
    tied = getattr(model, "all_tied_weights_keys", {})
    for pair in [pair for pair in tied.items() if any(name.rpartition(".")[0] in inside for name in pair)]:
        del tied[pair[0]]


def mark(model: Any, config: QuantKitConfig | None = None) -> None:
    """Let ``save_pretrained`` of a quantized transformers model write what ``from_pretrained`` needs.

    Args:
        model: a model with a report; without any INT8 layer it is left alone, since transformers can save it by itself.
        config: what it was loaded with; left out, it is made from the report.
    """
    layers = layer_records(model)
    if not layers:
        return
    config = config or _config_of(model)
    config.layers, config.attention, config.checksums = layers, attention_records(model) or None, None
    config.format_version = version_of(config.attention)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, NAME
    if getattr(model, "hf_quantizer", None) is None:
        model.hf_quantizer = QuantKitQuantizer(config, pre_quantized=True)


def mark_parts(model: nn.Module) -> None:
    """Let ``save_pretrained`` of transformers models that are parts of ``model`` write codes, and not what looks like weights.

    Args:
        model: a model with a report, of any library.
    """
    for part in model.modules():
        inner = part is not model and isinstance(part, PreTrainedModel) and getattr(part, "hf_quantizer", None) is None
        if inner and any(isinstance(m, W8A8Linear) for m in part.modules()):
            part.hf_quantizer = QuantKitQuantizer(_config_of(model), pre_quantized=True)


def _config_of(model: nn.Module) -> QuantKitConfig:
    """The configuration that says what the report of a quantized model says."""
    record, layers = report(model), layer_records(model)
    threshold = max(facts["threshold"] for facts in layers.values())
    return QuantKitConfig(record.method, record.scheme or "w8a8", threshold=threshold, seed=record.seed, layers=layers)


def _names_in(model: Any, records: Iterable[str]) -> tuple[str, str]:
    """What the names in ``config.json`` begin with and those in ``model`` do not, and the other way round.

    They differ where a folder is opened by a class with or without a head (``AutoModel``), and where the text part of a larger
    model was quantized by itself.
    """
    modules, base = dict(model.named_modules()), f"{model.base_model_prefix}."
    text = model.config.get_text_config(decoder=True)
    inner = [f"{name}." for name, m in modules.items() if name and getattr(m, "config", None) is text]

    def there(path: list[str]) -> bool:
        """Whether a linear can be there: experts that are not taken apart yet are two names above theirs."""
        return any(".".join(path[:n]) in modules for n in range(max(1, len(path) - 2), len(path) + 1))

    for old, new in [("", ""), (base, ""), ("", base), *(("", prefix) for prefix in inner)]:
        found = _moved(dict.fromkeys(records), old, new)
        if found and all(there(name.split(".")) for name in found):
            return old, new
    return "", ""


def _moved(records: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The records under names that begin with ``new`` in place of ``old``; without those that do not begin with it."""
    return {new + name.removeprefix(old): record for name, record in records.items() if name.startswith(old)}


def enter_tables() -> None:
    """Enter quantkit into the tables of transformers, unless it is there already."""
    if NAME not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(NAME)(QuantKitConfig)
        auto.register_quantizer(NAME)(QuantKitQuantizer)
