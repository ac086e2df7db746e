"""Shifts and scales go into producers, and the model computes the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import normal, outputs
from torch import nn

import quantkit
from quantkit import Range, Transform
from quantkit.calibrators import SiteView
from quantkit.discovery.equivalence import relative_error


def test_shift_beside_a_folded_scale() -> None:
    """The shift is in units of the original activation, and what arrives is divided by the folded scale."""

    class ShiftAndScale(quantkit.PerSite):
        name, stage = "shift-and-scale", quantkit.Stage.SCALE

        def plan_site(self, site: quantkit.SiteView) -> tuple[quantkit.Transform, dict[str, object]]:
            k = site.site.channels
            scale = site.site.tie(torch.rand(k) * 8 + 0.5)
            return quantkit.Transform(shift=torch.randn(k) * 0.1, scale=scale), {}

    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8))
    x = torch.randn(32, 64)
    wanted = model(x).detach()
    quantkit.quantize(model, ShiftAndScale(), calibration=[x], progress=False)
    assert quantkit.report(model).layers[0].folded_into == "0"
    error = (model(x) - wanted).pow(2).mean() / wanted.pow(2).mean()
    assert error < 1e-3  # 30 dB; a shift in the wrong units is off by more than the signal


class Shifts(quantkit.PerSite):
    """A shift and a scale for every channel, wherever a producer can take both."""

    name, stage, statistics = "shifts", quantkit.Stage.SCALE, (Range,)

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        producer = site.site.producer
        if producer is None or producer.bias is None:
            return Transform(), {}
        rows = normal(int(producer.rows.max()) + 1, seed=len(site.name))[producer.rows]
        size = site.site.tie(site.statistic(Range).absmax)
        return Transform(shift=rows * size / 2, scale=(rows / 2).exp()), {}


@pytest.mark.parametrize(
    ("name", "count"), [("gpt2", 6), ("opt", 6), ("gpt-neox", 6), ("llama-bias", 2), ("nanogpt", 6), ("bert", 2), ("llama", 0)]
)
def test_shifts_fold_where_biases_make_up_for_them(name: str, count: int) -> None:
    """Norms in front of linears, and values in front of the output of attention; not gates and curves."""
    family = FAMILIES[name]
    model, batch = family.build(), family.batch()
    wanted = copy.deepcopy(model)
    producers = [site.producer for site in quantkit.discover(model, batch).sites]
    assert sum(p is not None and p.bias is not None for p in producers) == count
    shifted = quantkit.quantize(model, Shifts(), scheme=None, calibration=[batch], progress=False)
    assert quantkit.verify_equivalence(shifted, wanted, batch).holds
    rtn, ours = (
        quantkit.quantize(copy.deepcopy(wanted), method, calibration=[batch], progress=False) for method in ("rtn", Shifts())
    )
    layers = [layer for layer in quantkit.report(ours).layers if layer.kind == "int8"]
    assert all("shift" not in layer.at_run_time and (layer.sqnr_db is None or layer.sqnr_db > 25) for layer in layers)
    errors = [relative_error(outputs(wanted, batch), outputs(quantized, batch)) for quantized in (rtn, ours)]
    assert errors[1] < max(2 * errors[0], 0.05)  # a bias that is wrong anywhere is off by more than the signal
