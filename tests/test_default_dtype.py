"""What ``torch.set_default_dtype`` and ``torch.set_default_device`` are set to is the business of others.

Models are quantized and run under each of them, and must come out with the bits that they have under float32 on the CPU.
"""

from __future__ import annotations

import ast
import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, llama, state, tokens
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import quantkit

PACKAGE = Path(quantkit.__file__).parent
FACTORIES = {function.__name__ for function in _device_constructors()}


def test_every_tensor_is_made_with_a_dtype_and_on_a_device() -> None:
    """One rule without exceptions: whoever makes a tensor from nothing names both, or passes them on as ``**name``."""
    forgotten = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in FACTORIES:
                continue
            named = {keyword.arg for keyword in node.keywords}
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and None not in named:
                lacking = " and ".join(sorted({"dtype", "device"} - named))
                forgotten += [f"{path.relative_to(PACKAGE)}:{node.lineno} names no {lacking}"] if lacking else []
    assert not forgotten, "\n".join(forgotten)


@contextlib.contextmanager
def default(what: torch.dtype | str) -> Iterator[None]:
    if isinstance(what, str):
        torch.set_default_device(what)
    else:
        torch.set_default_dtype(what)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DEFAULTS = [torch.float64, torch.bfloat16, torch.float16, "meta"]

RECIPES: dict[str, tuple[Any, str]] = {
    "smoothquant": ("smoothquant", "w8a8"),
    "static": ("smoothquant", "w8a8-static"),
    "clusters": (quantkit.RPTQ(4, tile=16), "w8a8"),
    "searched clusters": (quantkit.RPTQ(4, by="kmeans"), "w8a8"),
    "rotation": ("hadamard", "w8a8"),
    "threshold": ("llm_int8", "w8a8"),
    "gptq": ("gptq", "w8a8"),
    "learned": (quantkit.OmniQuant(epochs=1), "w8a8"),
    "4 bits": ("best", "w4a8"),
    "float input": ("rtn", "w8a16"),
}


class Block(nn.Module):
    """A residual branch behind a norm, with a gate, so that there are folds, orders and rotations to find."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.relu(self.gate(y)) * self.up(y))


def float_model() -> tuple[nn.Module, list[Tensor], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(Block(), Block()), nn.LayerNorm(32), nn.Linear(32, 8)).eval()
    return model, [torch.randn(16, 32) for _ in range(3)], torch.randn(7, 32)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As the layers run, and as the reference runs: one token, several, and in 16 bit."""
    with torch.no_grad():
        found = [model(x), model(x[:1]), copy.deepcopy(model).bfloat16()(x.bfloat16())]
        with quantkit.use_backend("reference"):
            return [*found, model(x)]


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_bits_are_those_of_any_default(recipe: str, what: torch.dtype | str) -> None:
    method, scheme = RECIPES[recipe]
    model, batches, x = float_model()
    twin = copy.deepcopy(model)
    quantkit.quantize(model, method, scheme=scheme, calibration=batches, progress=False)
    wanted = outputs(model, x)
    with default(what):
        assert_equal(outputs(model, x), wanted)
        quantkit.quantize(twin, method, scheme=scheme, calibration=batches, progress=False)
        assert str(quantkit.report(twin)) == str(quantkit.report(model))
        assert_equal(outputs(twin, x), wanted)
    assert_equal(outputs(twin, x), wanted)


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
def test_plans_and_discovery_are_those_of_any_default(what: torch.dtype | str, tmp_path: Path) -> None:
    model, batches, x = float_model()
    sites = quantkit.discover(model, batches[0])
    twin = copy.deepcopy(model)
    with default(what):
        assert repr(quantkit.discover(model, batches[0])) == repr(sites)
        quantkit.save_plan(quantkit.plan(model, calibration=batches), tmp_path / "plan")
        quantkit.convert(twin, quantkit.load_plan(tmp_path / "plan"))
    quantkit.quantize(model, calibration=batches, progress=False)
    assert_equal(outputs(twin, x), outputs(model, x))


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
def test_checkpoints_are_those_of_any_default(what: torch.dtype | str, tmp_path: Path) -> None:
    model, batches, x = float_model()
    empty = copy.deepcopy(model)
    quantkit.quantize(model, "hadamard", calibration=batches, progress=False)
    with default(what):
        quantkit.save(model, tmp_path / "saved")
        loaded = quantkit.load(tmp_path / "saved", model=empty)
        assert str(quantkit.report(loaded)) == str(quantkit.report(model))
        assert_same(state(loaded), state(model))
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("what", DEFAULTS[:-1], ids=str)  # models of transformers themselves make tensors on a default device
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-kv4", "w4a8-kv4"])
def test_rotated_language_models_are_those_of_any_default(scheme: str, what: torch.dtype | str) -> None:
    model, batches = llama(), [tokens(seed=1), tokens(seed=2)]
    twin = copy.deepcopy(model)
    quantkit.quantize(model, ["rotate", "smoothquant"], scheme=scheme, calibration=batches, progress=False)
    with default(what):
        quantkit.quantize(twin, ["rotate", "smoothquant"], scheme=scheme, calibration=batches, progress=False)
        assert str(quantkit.report(twin)) == str(quantkit.report(model))
    assert_same(state(twin), state(model))


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
