"""Values that no quantizer writes are refused wherever they come in: a kernel would read where an index points."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama, normal, operand, outputs, quantized, tokens
from torch import Tensor

import quantkit
from quantkit import RPTQ, CheckpointError, Hadamard, LLMInt8, ModelError, W8A8Linear
from quantkit.checkpoint.record import RECORD_FILE, digest_of
from quantkit.core.validity import LONGEST_WITH_ALL_CODES, value_fault

NAN, INF = float("nan"), float("inf")
WITH: dict[str, tuple[Any, str]] = {
    "permutation": (RPTQ(4), "w8a8"),
    "outlier_index": (LLMInt8(columns=3), "w8a8"),
    "outlier_weight": (LLMInt8(columns=3), "w8a8"),
    "rotation_signs": (Hadamard(seed=1), "w8a8"),
    "input_scale": ("rtn", "w8a8-static"),
    "input_zero_point": ("rtn", "w8a8-static-asym"),
    "weight_multipliers": ("rtn", "w4a8-g16"),
    "weight_scale": ("rtn", "w8a8"),
}
"""A method and a scheme that give a layer such a tensor."""


def model_with(tensor: str) -> tuple[Any, str]:
    """A quantized Llama, and the name of a layer in it that has such a tensor."""
    method, scheme = WITH[tensor]
    model = quantized(llama(), method, scheme=scheme)
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, W8A8Linear))
    return model, next(name for name, layer in layers if getattr(layer, tensor) is not None)


def planted(old: Tensor, value: float, index: int = 0) -> Tensor:
    new = old.clone()
    new.view(-1)[index] = value
    return new


WRONG: dict[str, tuple[str, float]] = {
    "an index beyond": ("permutation", 10_000),
    "an index below": ("permutation", -1),
    "an index twice": ("permutation", 1),
    "an outlier beyond": ("outlier_index", 10_000),
    "an outlier below": ("outlier_index", -1),
    "a scale that is NaN": ("weight_scale", NAN),
    "a scale that is infinite": ("weight_scale", INF),
    "a scale of 0": ("weight_scale", 0.0),
    "a scale below 0": ("weight_scale", -1.0),
    "an input scale of 0": ("input_scale", 0.0),
    "an input scale that is NaN": ("input_scale", NAN),
    "a zero point beyond": ("input_zero_point", 128),
    "a zero point below": ("input_zero_point", -129),
    "a sign of 2": ("rotation_signs", 2.0),
    "a sign that is NaN": ("rotation_signs", NAN),
    "an outlier's weight that is infinite": ("outlier_weight", INF),
    "a multiplier of 0": ("weight_multipliers", 0),
    "a multiplier below 0": ("weight_multipliers", -3),
}


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, str]]:
    return {tensor: model_with(tensor) for tensor in WITH}


@pytest.mark.parametrize("case", WRONG)
def test_every_way_in(case: str, models: dict[str, tuple[Any, str]], tmp_path: Path) -> None:
    """A state, a checkpoint whose digests were made anew, and a folder of ``save_pretrained``."""
    tensor, value = WRONG[case]
    model, name = models[tensor]
    assert value_fault(model.get_submodule(name).operand) is None
    key = f"{name}.{tensor}"
    state = {k: planted(t, value) if k == key else t for k, t in model.state_dict().items()}
    before = outputs(model, tokens())
    with pytest.raises(RuntimeError, match="cannot hold this state, which is damaged"):
        model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, tokens()), strict=True))

    quantkit.save(model, tmp_path / "own")
    change(tmp_path / "own", key, value)
    body = json.loads((tmp_path / "own" / RECORD_FILE).read_text())
    renewed(tmp_path / "own", body)
    with pytest.raises(CheckpointError, match="is damaged"):
        quantkit.load(tmp_path / "own")

    model.save_pretrained(tmp_path / "theirs")
    change(tmp_path / "theirs", key, value)
    with pytest.raises(CheckpointError, match="files are damaged"):
        type(model).from_pretrained(tmp_path / "theirs")


def change(folder: Path, key: str, value: float) -> None:
    """Overwrite the first number of a tensor in the safetensors files of ``folder``."""
    codes = {"F32": "<f", "I64": "<q", "I32": "<i", "I8": "<b"}
    for file in folder.glob("model*.safetensors"):
        data = bytearray(file.read_bytes())
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        if key in header:
            struct.pack_into(codes[header[key]["dtype"]], data, 8 + length + header[key]["data_offsets"][0], value)
            file.write_bytes(data)
            return
    raise AssertionError(f"no {key}")


def renewed(folder: Path, body: dict[str, Any]) -> None:
    """The record with the hashes of the files as they are now."""
    for name, facts in body["files"].items():
        facts["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    body.pop("digest")
    (folder / RECORD_FILE).write_text(json.dumps({**body, "digest": digest_of(body)}))


@pytest.mark.parametrize("value", [10_000, -1, 1])
def test_a_buffer_that_was_replaced(value: int, models: dict[str, tuple[Any, str]]) -> None:
    """K + i would read row r + 1, which is what another request is about."""
    model, name = models["permutation"]
    layer = model.get_submodule(name)
    kept = layer.permutation
    layer.permutation = planted(kept, value)
    with pytest.raises(ModelError, match="permutation is no order of"):
        model(tokens())
    layer.permutation = kept
    model(tokens())


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("scale", torch.ones(8, 1, dtype=torch.float64)),
        ("scale", torch.ones(8, 1, dtype=torch.int32)),
        ("stored", torch.zeros(8, 16, dtype=torch.int16)),
        ("stored", torch.zeros(8, 16, dtype=torch.uint8)),
        ("bias", torch.zeros(8, dtype=torch.complex64)),
        ("bias", torch.zeros(8, device="meta")),
        ("scale", torch.ones(8, 1).to_sparse()),
    ],
    ids=str,
)
def test_tensors_that_no_kernel_may_get(name: str, tensor: Tensor) -> None:
    with pytest.raises(quantkit.MethodError, match=name):
        dataclasses.replace(operand(16, 8), **{name: tensor})


def test_the_longest_rows_have_no_room_for_the_lowest_code() -> None:
    """Other libraries write -128, with which sums of 8-bit products stay inside int32 up to 65,793 channels."""
    for k, right in ((16, True), (LONGEST_WITH_ALL_CODES, True), (LONGEST_WITH_ALL_CODES + 1, False)):
        codes = torch.zeros(1, k, dtype=torch.int8)
        codes[0, -1] = -128
        fault = value_fault(dataclasses.replace(operand(k, 1), stored=codes))
        assert (fault is None) is right


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_inputs_that_lie_nowhere(backend: str) -> None:
    """Zeros without memory are zeros, a view that is negated later is negated, and freed memory is refused."""
    with quantkit.use_backend(backend):
        lie_nowhere()


def lie_nowhere() -> None:
    layer = W8A8Linear.from_operand(operand(16, 8))
    x = normal(3, 16)
    assert torch.equal(layer(torch._efficientzerotensor((3, 16))), layer(torch.zeros(3, 16)))
    negated = torch._neg_view(x)
    assert torch.equal(layer(negated), layer(-x))
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(ModelError, match="without memory: its storage was given back"):
        layer(freed)
    layer(x)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(ModelError, match=r"memory of an INT8 weight|without memory: its storage was given back"):
        layer(x)
