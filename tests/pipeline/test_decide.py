"""Calibrators of others decide: what they see, and that nothing which they do reaches the model by another way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Odd, assert_same, mlp, normal, outputs, quantized, refused
from torch import Tensor, nn

import quantkit
from quantkit import (
    CalibrationError,
    MethodError,
    Plan,
    Range,
    SmoothQuant,
    Stage,
    Transform,
)


class Halve:
    """Ten lines, no base class."""

    name, stage, statistics = "halve", Stage.SCALE, (Range,)

    def plan(self, view: Any) -> Plan:
        self.seen = {site.name: site.statistic(Range).absmax for site in view.sites}
        transforms = {site.name: Transform(scale=torch.full((site.site.channels,), 2.0)) for site in view.sites}
        return Plan(transforms, notes={site.name: {"factor": 2} for site in view.sites})


def test_calibrators_of_others() -> None:
    model, data, calibrator = mlp(), normal(2, 9, 16), Halve()
    original = copy.deepcopy(model)
    plain = outputs(quantized(copy.deepcopy(model), "rtn", calibration=[data]), data)
    quantized(model, [calibrator, "rtn"], calibration=[data])
    assert_same(calibrator.seen["up"], original.norm(data).abs().amax((0, 1)).detach())
    assert_same(model.norm.weight, original.norm.weight / 2)
    assert_same(outputs(model, data), plain)  # a power of two moves no rounding
    record = quantkit.report(model)
    assert record.method == ["halve", "rtn"]
    assert all(layer.notes == {"factor": 2} for layer in record.layers)


def test_calibrators_that_read_the_data_again() -> None:
    class Reader(Halve):
        def plan(self, view: Any) -> Plan:
            self.batches = [b for _ in range(2) for b in view.batches()]
            return Plan()

    data, reader = [normal(1, 3, 16)], Reader()
    quantized(mlp(), reader, calibration=data)
    assert_same(reader.batches, data * 2)
    with pytest.raises(quantkit.CalibrationError, match="more than once"):
        quantized(mlp(), reader, calibration=iter(data))


def test_shuffled_batches_give_the_same_ranges() -> None:
    def stream(order: list[int]) -> Iterator[Tensor]:
        return (normal(1, 4, 16, seed=i) for i in order)

    model = mlp()
    a, b = (quantized(copy.deepcopy(model), SmoothQuant(0.5), calibration=stream(o)) for o in ([0, 1, 2], [2, 0, 1]))
    assert_same(a.state_dict(), b.state_dict())


def test_a_site_that_nobody_plans() -> None:
    class Forgotten(quantkit.PerSite):
        name, stage = "forgotten", Stage.SCALE

    model = mlp()
    with refused(model, MethodError, "forgotten", "Forgotten", "plan_site"):
        quantized(model, Forgotten())


def test_a_range_that_no_scale_holds() -> None:
    """Each end is a float32, but not their distance."""
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Linear(2, 2))
    data = [torch.tensor([[3e38, -3e38]])]
    for linear in (model[1], model[2]):
        nn.init.constant_(linear.weight, 0.0)
    with refused(model, CalibrationError, "'1'", "-3.0e+38", "symmetric"):
        quantized(model, "rtn", calibration=data, scheme="w8a8-static-asym")
    assert quantized(model, "rtn", calibration=data, scheme="w8a8-static")[1].input_scale.isfinite()


def test_weights_are_copies() -> None:
    """A calibrator that writes to what it sees does not write to the model."""
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def scribble(site: Any) -> Any:
        for _, weight in site.weights():
            weight.zero_()
        return Transform(), {}

    quantized(model, Odd(scribble), scheme=None)
    assert_same(dict(model.state_dict()), before)


def test_plans_are_copied() -> None:
    """A plan may hold a parameter that its own fold changes."""

    def shifted(model: nn.Module, take: Any) -> Any:
        def plan(site: Any) -> Any:
            return Transform(shift=take(model.norm.bias.detach()), scale=torch.full((site.site.channels,), 4.0)), {}

        return quantized(model, Odd(plan), ignore=["down"]).state_dict()

    model = mlp()
    nn.init.normal_(model.norm.bias)
    assert_same(shifted(copy.deepcopy(model), lambda bias: bias), shifted(model, Tensor.clone))
