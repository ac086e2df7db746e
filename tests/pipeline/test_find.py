"""Linears that stay in floating point, and why."""

from __future__ import annotations

import pytest
import torch
from helpers import normal, quantized, refused
from torch import Tensor, nn

import quantkit
from quantkit import (
    CalibrationError,
    ModelError,
)
from quantkit.core.sites import Kept


def test_models_of_heads_only() -> None:
    model = nn.Sequential(nn.Linear(16, 4)).eval()
    with refused(model, ModelError, "no linear is left", "output head"):
        quantized(model)


class Experts(nn.Module):
    """The second expert is called, but on no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.head = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(0, -2)
        return self.head(torch.cat([self.a(h), self.b(h[:0])]))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_an_expert_that_no_token_chose(scheme: str) -> None:
    model = quantized(Experts(), scheme=scheme)
    reasons = {layer.name: layer.reason for layer in quantkit.report(model).layers if layer.kind == "float"}
    assert reasons == {"b": "no calibration token reached it", "head": "output head"}
    model = Experts()
    with refused(model, CalibrationError, "no calibration token", "b", "targets="):
        quantized(model, scheme=scheme, targets=["b"])


def test_a_head_alone() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False))
    model[1].weight = model[0].weight
    with refused(model, ModelError, "targets="):
        quantized(model, calibration=[torch.arange(6)[None]])


class Rescaling(nn.Module):
    """Halves a weight of its own when it is first run, as RWKV does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.done = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), False

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.down.weight.div_(2)
            self.done = True
        return self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize("targets", [None, ["up", "down"]])
def test_a_weight_that_the_model_writes_to_stays_float(targets: list[str] | None) -> None:
    model = quantkit.quantize(Rescaling(), "rtn", calibration=[normal(8, 16)], targets=targets, progress=False)
    down = next(layer for layer in quantkit.report(model).layers if layer.name == "down")
    assert (down.kind, down.reason) == ("float", Kept.WRITTEN)
