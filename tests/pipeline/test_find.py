"""Linears that stay in floating point, and why."""

from __future__ import annotations

import pytest
import torch
from helpers import quantized, refused
from torch import Tensor, nn

import quantkit
from quantkit import (
    CalibrationError,
    ModelError,
)


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
