"""The record of a checkpoint: what ``quantkit.json`` says, and how it is believed.

The record is one JSON object. It names the format and its version, the INT8 layers and the modules whose attention is rounded
with all that is needed to make empty ones (sizes, scheme, which optional buffers there are), the second names of tied tensors,
the buffers that were cast although no checkpoint holds them, the report, and the size and SHA-256 of every file. A digest over
all of it shows accidental changes. It is no signature, since anybody can compute it: therefore every key is checked for its
presence and type, and every fact of a layer for its sense, before a model is touched.

Whoever writes a checkpoint may add keys of their own; this file carries them and does not look at them.

Versions: layers of version 2 have no groups of channels, and nothing else is new in version 3. Version 4 is version 3 for
models whose attention is rounded, so that a quantkit that knows nothing of this refuses them. Versions 5 and 6 come after 3 and
4: codes have a third axis in the files, so that whoever knows nothing of quantkit cannot take them for a weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.files import inside, old_copies, read_json
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.facts import Facts
from quantkit.core.heads import HeadSizes
from quantkit.core.operand import empty_operand
from quantkit.core.scheme import Scheme
from quantkit.layers.attention import CHILD, AttentionQuantizer, attention_quantizers
from quantkit.layers.linear import W8A8Linear

RECORD_FILE = "quantkit.json"
FORMAT_VERSION = 5
ATTENTION_VERSION = 6
READABLE = (2, 3, 4, 5, 6)
LAYER_FACTS = {
    "in_features": int, "out_features": int, "scheme": str, "bias": bool, "rotation_block": int, "threshold": float,
    "outliers": int, "buffers": list, "groups": list,
}  # fmt: skip
ATTENTION_FACTS = {"scheme": str, "queries": int, "keys": int, "width": int, "value_width": int, "clusters": int}
CASTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


# ---- the record as a whole


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint, as the newest version has it, with every key checked.

    Raises:
        CheckpointError: it is missing, damaged, changed, of a version that is not known, or not quantkit's.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} is no quantkit checkpoint: it has no {RECORD_FILE}{old_copies(folder)}")
    body = read_json(inside(folder, RECORD_FILE, RECORD_FILE))
    if not isinstance(body, dict) or body.get("format") != "quantkit":
        raise CheckpointError(f"{file} was not written by quantkit")
    check_version(folder, body.get("format_version"))
    digest = body.pop("digest", None)
    try:
        wanted = digest_of(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if digest != wanted:
        raise CheckpointError(f"{file} was changed after it was written (its digest does not match)")
    if isinstance(body.get("layers"), dict):
        body["layers"] = upgraded(body["layers"], body["format_version"])
    bad = _malformed(body)
    if bad is not None:
        raise CheckpointError(f"{file} is damaged: {bad!r} is missing or malformed")
    return body


def check_version(source: Any, version: Any) -> None:
    """Raise a CheckpointError if ``source`` (which the message names) has a version that this quantkit cannot read."""
    if version not in READABLE:
        raise CheckpointError(
            f"{source} has format version {version!r} and this quantkit reads {' and '.join(map(str, READABLE))}: "
            "upgrade quantkit-w8a8, or quantize the model again"
        )


def version_of(attention: Mapping[str, Any] | None) -> int:
    """The format version of a model with these :func:`attention_records`."""
    return ATTENTION_VERSION if attention else FORMAT_VERSION


def rounds_attention(version: int) -> bool:
    """Whether a model of this format version has :func:`attention_records`."""
    return version in (4, ATTENTION_VERSION)


def upgraded(layers: dict[str, Any], version: int) -> dict[str, Any]:
    """Records of layers that a checkpoint of ``version`` has, as the newest version has them."""
    if version != 2:
        return layers
    return {name: {**facts, "groups": []} if isinstance(facts, dict) else facts for name, facts in layers.items()}


def digest_of(body: dict[str, Any]) -> str:
    """SHA-256 over a record without its ``"digest"``, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _malformed(body: dict[str, Any]) -> str | None:
    """The first key of a record that is missing or holds something of another type than it should, if any."""
    attention = rounds_attention(body["format_version"])
    for key in ("files", "layers", "tied", "report", *(["attention"] if attention else [])):
        if not isinstance(body.get(key), dict):
            return key
    if bool(body.get("attention")) != attention:
        return "attention"
    if not all(_has(facts, {"sha256": str, "bytes": int}) for facts in body["files"].values()):
        return "files"
    if not all(_has(facts, LAYER_FACTS) for facts in body["layers"].values()):
        return "layers"
    if not all(isinstance(name, str) for name in body["tied"].values()):
        return "tied"
    if not isinstance(body.get("check", {}), dict):
        return "check"
    cast = body.get("cast", {})
    if not isinstance(cast, dict) or not all(dtype in CASTS.values() for dtype in cast.values()):
        return "cast"
    return None


def _has(value: Any, facts: dict[str, type]) -> bool:
    return isinstance(value, dict) and all(type(value.get(key)) is kind for key, kind in facts.items())


# ---- buffers that a checkpoint does not hold


def cast_buffers(model: nn.Module) -> dict[str, str]:
    """Buffers in 16 bits that are in no state dict, and their dtype.

    Rotary frequencies are such buffers. They are computed anew in float32 when a model is built, and whoever cast the whole
    model has cast them too, which changes what it computes.
    """
    held = model.state_dict().keys()
    return {name: CASTS[b.dtype] for name, b in model.named_buffers() if b.dtype in CASTS and name not in held}


def check_cast_buffers(model: nn.Module, cast: Mapping[str, str]) -> None:
    """Raise a CheckpointError unless ``model`` has all buffers that :func:`cast_buffers` listed."""
    buffers = dict(model.named_buffers())
    missing = next((name for name in cast if name not in buffers), None)
    if missing is not None:
        raise CheckpointError(f"the checkpoint casts the buffer {missing!r}, and the model has none of this name")


# ---- layers


def layer_records(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The record of every INT8 layer of a model, by name: what :func:`empty_layer` needs to know."""
    return {name: _layer_record(m) for name, m in model.named_modules() if isinstance(m, W8A8Linear)}


def _layer_record(layer: W8A8Linear) -> dict[str, Any]:
    operand = layer.operand
    outliers = operand.rewrite.outliers
    return operand.facts.record(list(operand.tensors()), 0 if outliers is None else len(outliers))


def empty_layer(name: str, record: Any, dtype: torch.dtype) -> W8A8Linear:
    """An INT8 layer on the meta device, with the buffers that its record says it has.

    Args:
        name: of the layer, for messages.
        record: what :func:`layer_records` wrote.
        dtype: of the linear that it replaces.

    Raises:
        CheckpointError: the record makes no sense.
    """
    if not _has(record, LAYER_FACTS):
        raise CheckpointError(f"the record of layer {name!r} is damaged")
    try:
        facts = Facts.read(record)
    except QuantkitError as error:
        raise CheckpointError(f"layer {name!r}: {error}") from None
    operand = empty_operand(facts, bias=record["bias"], optional=record["buffers"], outliers=record["outliers"], device="meta")
    return W8A8Linear.from_operand(operand, dtype)


def codes_apart(model: nn.Module, state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict of ``model`` as files hold it: codes are ``[N, K, 1]``.

    Codes have the name that a float weight has in the float model, and libraries that load it from a file cast integers to
    floats and ignore scales. They compare shapes, though.

    Args:
        model: the model.
        state: its state dict, which is changed. The third axis is a view.
        prefix: of the names in ``state``.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        key = f"{prefix}{name}.weight"
        if isinstance(module, W8A8Linear) and key in state and state[key].dim() == 2:
            state[key] = state[key].unsqueeze(-1)
    return state


# ---- attention


def attention_records(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What :func:`empty_quantizers` needs to know, by the name of the module whose attention is rounded."""
    return {
        name: {"scheme": q.scheme.name, **vars(q.heads), "clusters": q.clusters}
        for name, q in attention_quantizers(model).items()
    }


def empty_quantizers(model: nn.Module, records: Mapping[str, Any], layers: Collection[str]) -> dict[str, AttentionQuantizer]:
    """Quantizers of attention on the meta device, by the name of the module of ``model`` that each belongs to.

    Args:
        model: the model that they will be attached to.
        records: what :func:`attention_records` wrote.
        layers: names of the INT8 layers, which compute no attention.

    Raises:
        CheckpointError: a record makes no sense, or there is no such module.
    """
    modules, quantizers = dict(model.named_modules()), {}
    for name, facts in records.items():
        if not _has(facts, ATTENTION_FACTS):
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
