"""Models that were compiled before: what was compiled is quantized, and runs the quantized model from then on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MLP, assert_same, mlp, normal, quantized, refused
from torch import Tensor, nn

import quantkit
from quantkit import ModelError, W8A8Linear

X = normal(2, 9, 16)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def inside(name: str, how: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, how(model.get_submodule(name)))
        return model

    return change


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "model": compiled,
    "model in place": in_place,
    "block": inside("first", compiled),
    "block in place": inside("first", in_place),
    "linear": inside("first.up", compiled),
    "linear in place": inside("first.up", in_place),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_compiled_before(way: str) -> None:
    model = Two().eval()
    plan = quantkit.plan(copy.deepcopy(model), calibration=[X], progress=False)
    twin = copy.deepcopy(model)
    wanted = quantized(copy.deepcopy(model))(X)
    model = WAYS[way](model)
    model(X)  # traced in floating point
    assert quantized(model) is model
    assert_same(model(X), wanted)
    assert [layer.kind for layer in quantkit.report(model).layers] == ["int8"] * 4
    if way == "model":
        other = compiled(twin)
        assert quantkit.plan(other, calibration=[X], progress=False).kept == plan.kept
        assert len(quantkit.discover(other, X).sites) == 4
        assert quantkit.verify_equivalence(other, twin, X).error == 0
        assert_same(quantkit.convert(other, plan)(X), wanted)


@torch.no_grad()
def test_files_of_compiled_models(tmp_path: Path) -> None:
    model, fresh = compiled(quantized(Two().eval())), compiled(Two().eval())
    fresh(X)
    assert quantkit.load(quantkit.save(model, tmp_path / "out"), model=fresh) is fresh
    assert isinstance(fresh.first.up, W8A8Linear)
    assert_same(fresh(X), model(X))


def test_scripts() -> None:
    for script in (torch.jit.trace(mlp(), X), torch.jit.script(mlp())):
        with refused(script, ModelError, "whose code is fixed", "scripted or traced"):
            quantized(script)


def test_scripted_parts_stay_as_they_are() -> None:
    model = nn.Sequential(mlp(), torch.jit.script(mlp())).eval()
    wanted = model[1](X)
    assert {layer.name for layer in quantkit.report(quantized(model)).layers if layer.kind == "int8"} == {"0.up", "0.down"}
    assert_same(model[1](X), wanted)
