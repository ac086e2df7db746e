"""save() and load(): safetensors and one JSON record, atomic, hashed, no pickle. load() also opens compressed-tensors folders.

A checkpoint is a folder::

    model-00001-of-00001.safetensors    every tensor; INT8 weights, float32 scales, the rest in the model's dtype
    quantkit.json                       the record: layers, schemes, report, SHA-256 of each file, and of itself
    config.json, generation_config.json, tokenizer files     for transformers models

It is written to a temporary folder beside the target and renamed at the end, so a crash leaves no half checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantkit.core.errors import CheckpointError, ModelError, QuantkitError
from quantkit.core.operand import Facts
from quantkit.core.heads import HeadSizes
from quantkit.core.report import Report, attach, report
from quantkit.core.scheme import Scheme
from quantkit.integrations.compressed.layout import METHOD as COMPRESSED
from quantkit.integrations.compressed.layout import parse
from quantkit.layers.attention import CHILD, AttentionQuantizer, attach_attention, attention_quantizers
from quantkit.layers.linear import W8A8Linear
from quantkit.model.experts import put_back, unfuse
from quantkit.model.modules import linears_of, replace_module, weight_of

RECORD_FILE = "quantkit.json"
FORMAT_VERSION = 3
ATTENTION_VERSION = 4
"""Of models whose attention is rounded: what knows nothing of that must not read them."""
READABLE = (2, 3, 4)
"""Layers of version 2 have no clusters of channels; nothing else is new."""
MAX_RECORD_BYTES = 64 * 2**20
FILE_NAME = re.compile(r"[\w\- ][\w.\- ]{0,200}")
LAYER_FACTS = {"in_features": int, "out_features": int, "scheme": str, "bias": bool, "rotation_block": int}
LAYER_FACTS |= {"threshold": float, "outliers": int, "buffers": list, "groups": list}
ATTENTION_FACTS = {"scheme": str, "queries": int, "keys": int, "width": int, "value_width": int, "clusters": int}
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
"""How safetensors calls what is no floating-point number."""
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
"""The names that transformers and the engines look for."""


class Stored(NamedTuple):
    """A tensor that a safetensors file says it holds."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def save(model: nn.Module, path: str | os.PathLike[str], *, tokenizer: Any = None, shard_bytes: int = 4 * 2**30) -> Path:
    """Write a quantized model to the folder ``path``.

    Args:
        model: a model that :func:`quantkit.quantize` returned.
        path: a folder that does not exist, is empty, or holds a quantkit checkpoint (which is replaced as a whole).
        tokenizer: a transformers tokenizer to put beside the model.
        shard_bytes: largest size of one safetensors file, in bytes.

    Returns:
        The folder.

    Raises:
        ModelError: quantkit has not quantized the model.
        CheckpointError: the folder holds something else.
    """
    record, target = report(model), Path(path)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / RECORD_FILE).is_file())):
        raise CheckpointError(f"{target} exists and is no quantkit checkpoint: choose an empty or a new folder")
    tensors, tied = unshared(model.state_dict())
    with written_whole(target) as folder:
        files = _write_shards(tensors, folder, shard_bytes)
        attention = attention_records(model)
        version = version_of(attention)
        transformers_class = _write_transformers_files(model, folder, tokenizer, version)
        files += [p.name for p in sorted(folder.iterdir()) if p.name not in files and p.is_file()]
        layers = {name: layer_record(m) for name, m in model.named_modules() if isinstance(m, W8A8Linear)}
        body = {
            "format": "quantkit",
            "format_version": version,
            "transformers_class": transformers_class,
            "layers": layers,
            **({"attention": attention} if attention else {}),
            "tied": tied,
            **({"cast": cast} if (cast := cast_buffers(model)) else {}),
            "files": {name: {"sha256": _sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in files},
            "report": record.to_dict(),
        }
        body["digest"] = _digest(body)
        (folder / RECORD_FILE).write_text(json.dumps(body, indent=1), encoding="utf-8")
    return target


@torch.inference_mode(False)
def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> nn.Module:
    """Open a checkpoint that :func:`save` wrote, or a W8A8 INT8 checkpoint in the compressed-tensors layout.

    The latter is what :func:`quantkit.export` and other tools write; its layers become INT8 layers of quantkit.

    Args:
        path: the folder.
        model: for a module that is not from transformers: a fresh float instance of the same architecture, filled in
            place and returned. Nothing is changed if the checkpoint does not fit.
        device: where to put it.
        verify: compare the SHA-256 of every file first.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: the folder is missing, truncated, tampered with, of a newer format, not safe, or of another model.
    """
    folder = Path(path)
    if is_compressed(folder):
        return _open_compressed(folder, model, device)
    body = _read_record(folder)
    files = _check_files(folder, body, verify)
    stored = _tensor_index(folder, files)
    if model is None:
        model = _empty_transformers_model(folder, body)
    elif any(isinstance(m, W8A8Linear) for m in model.modules()):
        raise ModelError("model= is quantized already: pass a fresh floating-point instance")
    taken_apart = unfuse(model, only=body["layers"])
    try:
        layers = _empty_layers(model, body["layers"])
        quantizers = empty_quantizers(model, body.get("attention", {}), layers)
        added = layers | {f"{name}.{CHILD}".removeprefix("."): quantizer for name, quantizer in quantizers.items()}
        _check_fit(model, added, stored, body["tied"])
        _check_buffers(model, body.get("cast", {}))
        record = _report_of(folder, body)
    except BaseException:
        put_back(model, taken_apart)
        raise
    tensors = {name: read_tensor(found.file, name, device) for name, found in stored.items()}
    tensors |= {alias: tensors[name] for alias, name in body["tied"].items()}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    attach_attention(model, quantizers)
    model.load_state_dict(tensors, strict=True, assign=True)
    for name, dtype in body.get("cast", {}).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_buffer(name).to(getattr(torch, dtype)))
    retie: Any = getattr(model, "tie_weights", None)
    if retie is not None:
        retie()
    model.to(device)
    attach(model, record)
    return model.eval()


# ---- writing


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``target`` at the end, or vanishes if anything fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    previous = None
    try:
        folder.chmod(0o755)
        yield folder
        for file in folder.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            previous = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, previous)
        os.replace(folder, target)
        if previous is not None:
            shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        if previous is not None and not target.exists():
            os.replace(previous, target)  # the old checkpoint was on its way out
        elif previous is not None:
            shutil.rmtree(previous, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        raise


def unshared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without the second names of tied ones, and alias -> name."""
    seen: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied


def _write_shards(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> list[str]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    return names


def _write_transformers_files(model: Any, folder: Path, tokenizer: Any, version: int) -> str | None:
    name = None
    if type(model).__module__.startswith("transformers.") and hasattr(model, "config"):
        name = type(model).__name__
        config = model.config.to_dict()
        config.pop("_name_or_path", None)
        config["architectures"] = [name]
        # Plain transformers must not take the integers for weights: the key makes it refuse or warn.
        config["quantization_config"] = {"quant_method": "quantkit", "format_version": version}
        (folder / "config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return name


def layer_record(layer: W8A8Linear) -> dict[str, Any]:
    """What :func:`empty_layer` needs to know."""
    operand = layer.operand
    outliers = operand.rewrite.outliers
    return operand.facts.record(list(operand.tensors()), 0 if outliers is None else len(outliers))


def attention_records(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What :func:`empty_quantizers` needs to know, by the name of the module whose attention is rounded."""
    return {
        name: {"scheme": q.scheme.name, **vars(q.heads), "clusters": q.clusters}
        for name, q in attention_quantizers(model).items()
    }


def version_of(attention: Any) -> int:
    """The format of a model with these :func:`attention_records`, or none."""
    return ATTENTION_VERSION if attention else FORMAT_VERSION


# ---- reading


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    if not folder.is_dir() or not file.is_file():
        raise CheckpointError(f"{folder} is no quantkit checkpoint: it has no {RECORD_FILE}")
    if file.stat().st_size > MAX_RECORD_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_RECORD_BYTES >> 20} MiB: that is no record of quantkit's")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        digest = body.pop("digest", None) if isinstance(body, dict) else None
        wanted = _digest(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(body, dict) or body.get("format") != "quantkit":
        raise CheckpointError(f"{file} was not written by quantkit")
    version = body.get("format_version")
    if version not in READABLE:
        raise CheckpointError(
            f"{folder} has format version {version!r} and this quantkit reads {' and '.join(map(str, READABLE))}: "
            "upgrade quantkit-w8a8, or quantize the model again"
        )
    if digest != wanted:
        raise CheckpointError(f"{file} was changed after it was written (its digest does not match)")
    if version == 2 and isinstance(body.get("layers"), dict):
        body["layers"] = {name: from_version_2(facts) for name, facts in body["layers"].items()}
    _check_record(file, body)
    return body


def from_version_2(facts: Any) -> Any:
    """The record of a layer as this version has it."""
    return {**facts, "groups": []} if isinstance(facts, dict) else facts


def cast_buffers(model: nn.Module) -> dict[str, str]:
    """16-bit buffers that no checkpoint holds, such as rotary frequencies: who casts a whole model casts them too."""
    held, names = model.state_dict().keys(), {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return {name: names[b.dtype] for name, b in model.named_buffers() if b.dtype in names and name not in held}


def _check_buffers(model: nn.Module, cast: dict[str, str]) -> None:
    buffers = dict(model.named_buffers())
    missing = next((name for name in cast if name not in buffers), None)
    if missing is not None:
        raise CheckpointError(f"the checkpoint casts the buffer {missing!r}, and the model has none of this name")


def _check_record(file: Path, body: dict[str, Any]) -> None:
    """Every key is there with its type, since anybody can compute a digest."""
    facts: dict[str, Any] = {
        "files": dict,
        "layers": dict,
        "tied": dict,
        "report": dict,
        "transformers_class": (str, type(None)),
        **({"attention": dict} if body["format_version"] == ATTENTION_VERSION else {}),
    }
    bad = [key for key, kind in facts.items() if key not in body or not isinstance(body[key], kind)]
    if not bad and bool(body.get("attention")) != ("attention" in facts):
        bad.append("attention")
    if not bad:
        files, layers, tied = body["files"].values(), body["layers"].values(), body["tied"].values()
        bad += [] if all(_is_record(f, {"sha256": str, "bytes": int}) for f in files) else ["files"]
        bad += [] if all(_is_record(f, LAYER_FACTS) for f in layers) else ["layers"]
        bad += [] if all(isinstance(name, str) for name in tied) else ["tied"]
        cast = body.get("cast", {})
        bad += [] if isinstance(cast, dict) and all(d in ("bfloat16", "float16") for d in cast.values()) else ["cast"]
    if bad:
        raise CheckpointError(f"{file} is damaged: {bad[0]!r} is missing or malformed")


def _is_record(value: Any, facts: dict[str, type]) -> bool:
    return isinstance(value, dict) and all(type(value.get(key)) is kind for key, kind in facts.items())


def _report_of(folder: Path, body: dict[str, Any]) -> Report:
    try:
        return Report.from_dict(body["report"])
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder / RECORD_FILE} is damaged: its report cannot be read ({error})") from None


def _check_files(folder: Path, body: dict[str, Any], verify: bool) -> list[str]:
    """The safetensors files, once every listed file is found inside the folder, whole and unchanged."""
    for name, facts in body["files"].items():
        file = inside(folder, name, RECORD_FILE)
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes and should have {facts['bytes']}: truncated or changed"
            )
        if verify and _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file} was changed after it was written (its SHA-256 does not match)")
    return [name for name in body["files"] if name.endswith(".safetensors")]


def inside(folder: Path, name: str, said_by: str) -> Path:
    """The file called ``name``.

    Raises:
        CheckpointError: it is missing, or not in the folder.
    """
    file = folder / name
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{folder / said_by} lists {name!r}, a path outside the checkpoint: refused")
    if file.is_symlink() and file.resolve().parent != folder.resolve() and not _is_hub_cache(file):
        raise CheckpointError(f"{file} is a link that leaves the checkpoint: refused")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    return file


def _is_hub_cache(file: Path) -> bool:
    """huggingface_hub keeps snapshots as links into ``../../blobs`` of the same repository."""
    return file.parent.parent.name == "snapshots" and file.resolve().parent == (file.parent.parent.parent / "blobs").resolve()


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name, from its header alone.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  safe_open is no mapping
            return {name: Stored(file, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _tensor_index(folder: Path, files: Iterable[str]) -> dict[str, Stored]:
    index: dict[str, Stored] = {}
    for file in files:
        found = read_header(folder / file)
        twice = next((name for name in found if name in index), None)
        if twice is not None:
            raise CheckpointError(f"{folder}: tensor {twice!r} is stored twice")
        index |= found
    return index


def read_tensor(file: Path, name: str, device: torch.device | str) -> Tensor:
    """One tensor of a file; on a CPU its memory is the file's own, read when it is used.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt", device=str(device)) as handle:
            tensor: Tensor = handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"tensor {name!r} of {file} cannot be read: {error}") from None
    return tensor


def is_compressed(folder: Path) -> bool:
    """Whether this is a folder in the compressed-tensors layout, quantkit's own not among them."""
    if (folder / RECORD_FILE).is_file() or not (folder / CONFIG).is_file():
        return False
    config = _read_json(folder, CONFIG).get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == COMPRESSED


def _open_compressed(folder: Path, model: nn.Module | None, device: torch.device | str) -> nn.Module:
    """Everything that can be refused is, before transformers sees the folder."""
    if model is not None:
        raise CheckpointError(f"{folder} is a transformers model, which load() makes itself: leave model= out")
    config = _read_json(folder, CONFIG)
    try:
        parse(config["quantization_config"])
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    names = config.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise CheckpointError(f"{folder / CONFIG} names no class of model in 'architectures'")
    for key in ("transformers_weights", "auto_map"):
        if config.get(key):
            raise CheckpointError(f"{folder / CONFIG} has {key!r}, which points to files or code of its own: refused")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds an adapter beside the model: refused")
    stored = _tensor_index(folder, _weight_files(folder))
    if not any(found.dtype == "I8" for found in stored.values()):
        raise CheckpointError(f"{folder}: no tensor holds INT8 codes, and config.json says that some do")
    try:
        from quantkit.integrations.compressed.load import load_compressed
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is a transformers model: pip install 'quantkit-w8a8[transformers]' ({error})"
        ) from None
    return load_compressed(folder, names[0], device)


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files of a folder, each found in it, with the tensors that the index says."""
    if not (folder / INDEX).exists():
        return [inside(folder, WEIGHTS, CONFIG).name]
    places = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensors to files")
    files = sorted(set(places.values()))
    for name in files:
        if not inside(folder, name, INDEX).name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} lists {name!r}, which is no safetensors file: refused")
    held = _tensor_index(folder, files)
    for name, file in places.items():
        if name not in held or held[name].file.name != file:
            raise CheckpointError(f"tensor {name!r} is missing from {folder / file}, where the index has it")
    surplus = next((name for name in held if name not in places), None)
    if surplus is not None:
        raise CheckpointError(f"tensor {surplus!r} of {held[surplus].file} is not in the index")
    return files


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    file = inside(folder, name, name)
    if file.stat().st_size > MAX_RECORD_BYTES:
        raise CheckpointError(f"{file} is larger than {MAX_RECORD_BYTES >> 20} MiB: refused")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"{file} is damaged: it holds no JSON object")
    return body


def _empty_transformers_model(folder: Path, body: dict[str, Any]) -> nn.Module:
    name = body["transformers_class"]
    if name is None:
        raise CheckpointError(
            f"{folder} is no transformers model: pass a fresh instance, quantkit.load(path, model=MyModel(...))"
        )
    try:
        import transformers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise CheckpointError(
            f"{folder} is a transformers model: pip install 'quantkit-w8a8[transformers]' ({error})"
        ) from None
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"{folder}: this transformers has no model class {name!r}")
    cls: Any = found
    try:
        config_dict = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config_dict.pop("quantization_config", None)
        config = cls.config_class.from_dict(config_dict)
        with init_empty_weights(include_buffers=False):
            model = cls._from_config(config)
        if (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers makes of a config that it did not write
        raise CheckpointError(f"{folder}: {name} cannot be made from config.json: {error}") from error
    return model


def _empty_layers(model: nn.Module, records: dict[str, dict[str, Any]]) -> dict[str, W8A8Linear]:
    linears = linears_of(model)
    layers = {}
    for name, facts in records.items():
        if name not in linears:
            raise CheckpointError(
                f"the checkpoint quantizes {name!r}, and the model has no such linear: it is of another model"
            )
        n, k = facts["out_features"], facts["in_features"]
        if tuple(weight_of(linears[name]).shape) != (n, k):
            raise CheckpointError(f"layer {name!r} has {k} inputs and {n} outputs, and in the model it has other sizes")
        layers[name] = empty_layer(name, facts)
    return layers


def empty_layer(name: str, record: dict[str, Any]) -> W8A8Linear:
    """An INT8 layer on the meta device, with room for what :func:`layer_record` says that it has.

    Raises:
        CheckpointError: the record makes no sense.
    """
    if not _is_record(record, LAYER_FACTS):
        raise CheckpointError(f"the record of layer {name!r} is damaged")
    try:
        facts = Facts.read(record)
    except QuantkitError as error:
        raise CheckpointError(f"layer {name!r}: {error}") from None
    bias, optional, outliers = record["bias"], record["buffers"], record["outliers"]
    return W8A8Linear.from_operand(facts.empty(bias=bias, optional=optional, outliers=outliers, device="meta"))


def empty_quantizers(model: nn.Module, records: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, AttentionQuantizer]:
    """Quantizers on the meta device for modules of ``model``, none of which is among its INT8 ``layers``.

    Raises:
        CheckpointError: a record makes no sense, or there is no such module.
    """
    modules, quantizers = dict(model.named_modules()), {}
    for name, facts in records.items():
        if not _is_record(facts, ATTENTION_FACTS):
            raise CheckpointError(f"the record of the attention of {name!r} is damaged")
        heads, clusters = HeadSizes(*(facts[key] for key in ("queries", "keys", "width", "value_width"))), facts["clusters"]
        if name not in modules or name in layers or hasattr(modules[name], CHILD):
            raise CheckpointError(f"the checkpoint quantizes the attention of {name!r}, which the model does not have")
        fault = heads.fault or (None if 1 <= clusters <= max(heads.width, heads.value_width) else f"{clusters} clusters")
        try:
            scheme = Scheme.parse(facts["scheme"])
        except QuantkitError as error:
            raise CheckpointError(f"attention of {name!r}: {error}") from None
        if fault or not scheme.quantizes_attention:
            raise CheckpointError(f"attention of {name!r}: {fault or f'{scheme.name} does not quantize it'}")
        quantizers[name] = AttentionQuantizer(scheme, heads, clusters, "meta")
    return quantizers


def _check_fit(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    stored: dict[str, Stored],
    tied: dict[str, str],
) -> None:
    """Every tensor the model needs is there with its shape, and nothing else, before anything is assigned."""
    wanted = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    scales = set()
    for name, layer in layers.items():
        own = {f"{name}.{key}": t for key, t in layer.state_dict().items()}
        wanted |= own
        # The C passes read these as they are, so nothing but float32 will do.
        scales |= {
            key for key, t in own.items() if t.is_floating_point() and key.rpartition(".")[2] not in ("bias", "outlier_weight")
        }
    for name, tensor in wanted.items():
        source = tied.get(name, name)
        if source not in stored:
            raise CheckpointError(f"tensor {name!r} is missing from the checkpoint")
        _, shape, dtype = stored[source]
        if shape != tuple(tensor.shape):
            raise CheckpointError(f"tensor {name!r} has shape {list(shape)} and the model needs {list(tensor.shape)}")
        fits = dtype.startswith(("F", "BF")) if tensor.is_floating_point() else dtype == DTYPES.get(tensor.dtype, dtype)
        if not fits or (name in scales and dtype != "F32"):
            raise CheckpointError(f"tensor {name!r} is {dtype} and should be {'float32' if name in scales else tensor.dtype}")
    surplus = next((name for name in [*stored, *tied] if name not in wanted), None)
    if surplus is not None:
        raise CheckpointError(f"the checkpoint holds {surplus!r}, which the model has no place for: it is of another model")


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
