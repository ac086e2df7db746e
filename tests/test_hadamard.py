"""Hadamard: the function stays, spikes spread, widths that no block divides are told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit import Hadamard, LLMInt8, MethodError, Rotation, SmoothQuant, W8A8Linear


class Net(nn.Module):
    def __init__(self, width: int = 192, hidden: int = 96) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def loud(width: int = 192) -> Tensor:
    x = torch.randn(50, width)
    x[:, 7] *= 40
    return x


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("block", [8, 16, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rotation_preserves_the_product(block: int, seed: int | None, dtype: torch.dtype, tolerance: float) -> None:
    model = quantkit.quantize(Net(), Hadamard(block, seed), calibration=[loud()], progress=False)
    assert isinstance(model.up, W8A8Linear)
    rotation = Rotation(block, model.up.rotation_signs)
    eye = rotation.apply(torch.eye(192, dtype=dtype))
    assert float((eye @ eye.T - torch.eye(192, dtype=dtype)).abs().max()) < tolerance
    x, w = torch.randn(9, 192, dtype=dtype), torch.randn(5, 192, dtype=dtype)
    wanted = x @ w.T
    assert float((rotation.apply(x) @ rotation.apply(w).T - wanted).norm() / wanted.norm()) < tolerance


def test_spikes_cost_less() -> None:
    torch.manual_seed(0)
    model, x = Net(), loud()
    wanted = model(x)
    errors = []
    for method in ("rtn", "hadamard"):
        ours = quantkit.quantize(copy.deepcopy(model), method, calibration=[x], progress=False)
        with torch.no_grad():
            errors.append(float((ours(x) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize(
    ("width", "block", "used"), [(192, 64, 64), (96, 64, 32), (192, "full", 64), (256, "full", 256), (36, 64, 0)]
)
def test_block_that_divides(width: int, block: int | str, used: int) -> None:
    model = quantkit.quantize(Net(width), Hadamard(block), calibration=[loud(width)], progress=False)
    record = next(layer for layer in quantkit.report(model).layers if layer.name == "up")
    assert record.notes == ({"block": used} if used else {"rotated": "no: 36 channels"})
    assert (model.up.rotation_block or 0) == used


def test_seed_draws_signs_per_site(tmp_path: Path) -> None:
    def signs(seed: int) -> Tensor:
        model = quantkit.quantize(Net(96), Hadamard(seed=seed), calibration=[loud(96)], progress=False)
        assert not torch.equal(model.up.rotation_signs, model.mid.rotation_signs)
        return model.up.rotation_signs

    assert torch.equal(signs(1), signs(1))
    assert not torch.equal(signs(1), signs(2))
    model = quantkit.quantize(Net(), Hadamard(seed=1), calibration=[loud()], progress=False)
    quantkit.save(model, tmp_path / "saved")
    x = loud()
    again = quantkit.load(tmp_path / "saved", model=Net())
    assert torch.equal(again(x), model(x))
    assert torch.equal(model.up(x[:1]), model.up(x)[:1])  # whatever else is in the batch


@pytest.mark.parametrize("first", [SmoothQuant(0.5), LLMInt8(16)], ids=["smoothquant", "llm_int8"])
def test_composes(first: object) -> None:
    torch.manual_seed(0)
    model, x = Net(), loud()
    wanted = model(x)
    ours = quantkit.quantize(copy.deepcopy(model), [first, Hadamard()], calibration=[x], progress=False)
    assert ours.up.rotation_block == 64
    with torch.no_grad():
        assert float((ours(x) - wanted).norm() / wanted.norm()) < 0.02


def test_orders_and_values_that_make_no_sense() -> None:
    for after in (SmoothQuant(), LLMInt8(16)):
        with pytest.raises(MethodError, match="mixes channels"):
            quantkit.quantize(Net(), [Hadamard(), after], calibration=[loud()], progress=False)
    blocks: list[Any] = [0, 1, 4, 48, True, 64.0, "half"]
    for block in blocks:
        with pytest.raises(MethodError, match="power of two"):
            Hadamard(block)
    seeds: list[Any] = [1.5, True, "1"]
    for seed in seeds:
        with pytest.raises(MethodError, match="integer"):
            Hadamard(seed=seed)
