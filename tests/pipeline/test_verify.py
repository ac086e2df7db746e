"""The converted model is run as a whole: what its layers cannot explain is an error, and the float model comes back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, llama, mlp, normal, state, tokens
from torch import Tensor, nn

import quantkit
from quantkit import EquivalenceError, ModelError, W8A8Linear
from quantkit.core.report import Report, Verification
from quantkit.model import guard
from quantkit.pipeline import convert, quantize
from quantkit.pipeline.data import ENOUGH

PLACE = "model.layers.0.mlp.up_proj"


def swapped_scale(layer: W8A8Linear) -> None:
    layer.weight_scale = layer.weight_scale.flip(0) * torch.linspace(0.2, 3, len(layer.weight_scale))[:, None]


def dropped_hook(layer: W8A8Linear) -> None:
    """As if a hook had been lost that multiplied the input by three."""
    layer.pre_scale = torch.full((layer.in_features,), 1 / 3)


def wrong_order(layer: W8A8Linear) -> None:
    layer.permutation = torch.arange(layer.in_features).roll(1)


def bias_left_out(layer: W8A8Linear) -> None:
    layer.bias = None


FAULTS: list[Callable[[W8A8Linear], None]] = [swapped_scale, dropped_hook, wrong_order, bias_left_out]


def found_in(model: nn.Module) -> Verification:
    found = quantkit.report(model).verification
    assert found is not None
    return found


def level(model: nn.Module) -> float:
    measured = found_in(model).sqnr_db
    assert measured is not None
    return measured


def planted(monkeypatch: pytest.MonkeyPatch, place: str, fault: Callable[[W8A8Linear], None]) -> None:
    """Let converting go wrong at one layer, after that layer was measured by itself."""
    replace = convert.replace_module

    def replace_wrongly(model: nn.Module, name: str, new: nn.Module, *rest: Any) -> None:
        replace(model, name, new, *rest)
        if name == place and isinstance(new, W8A8Linear):
            fault(new)

    monkeypatch.setattr(convert, "replace_module", replace_wrongly)


def loud_llama() -> Any:
    """With biases, and weights that are large enough for every layer to matter."""
    model = llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        elif name.endswith("bias"):
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_a_fault_of_one_layer_is_found_at_the_end(monkeypatch: pytest.MonkeyPatch, fault: Any, method: str) -> None:
    model = loud_llama()
    before = state(model)
    planted(monkeypatch, PLACE, fault)
    with pytest.raises(EquivalenceError) as caught:
        quantkit.quantize(model, method, calibration=[tokens()], progress=False)
    assert PLACE in str(caught.value) or "model.layers.0.mlp.down_proj" in str(caught.value)
    assert all(words in str(caught.value) for words in ("verify=False", "ignore="))
    assert_same(state(model), before)
    with pytest.raises(ModelError):
        quantkit.report(model)
    monkeypatch.undo()
    quantkit.quantize(model, method, calibration=[tokens()], progress=False)  # it is as good as new


def test_the_check_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, PLACE, wrong_order)
    model = quantkit.quantize(loud_llama(), calibration=[tokens()], progress=False, verify=False)
    assert quantkit.report(model).verification is None


def test_a_model_too_large_to_be_kept_says_that_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "KEPT_BYTES", 1000)
    planted(monkeypatch, PLACE, wrong_order)
    model = loud_llama()
    with pytest.raises(EquivalenceError, match="load it again"):
        quantkit.quantize(model, calibration=[tokens()], progress=False)
    with pytest.raises(ModelError, match="interrupted half way"):
        quantkit.quantize(model, calibration=[tokens()], progress=False)


class ReadsCodes(nn.Module):
    """What quantkit cannot know of: code that asks a layer for more than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.head = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.up, W8A8Linear):
            raise TypeError("this is not the linear I was built with")
        return self.head(self.down(self.up(self.norm(x)).relu()).tanh())


def test_a_model_that_cannot_run_any_more_is_given_back() -> None:
    model = ReadsCodes().eval()
    before = state(model)
    with pytest.raises(ModelError, match=r"cannot run \(TypeError: this is not the linear I was built with\)"):
        quantkit.quantize(model, calibration=[normal(16, 32)], progress=False)
    assert_same(state(model), before)
    quantkit.quantize(model, calibration=[normal(16, 32)], progress=False, ignore=["up"])
    assert level(model) > 25


def test_the_report_has_the_figures() -> None:
    model = llama()
    float_model = copy.deepcopy(model)
    quantkit.quantize(model, calibration=[tokens()], progress=False)
    found = found_in(model)
    with torch.no_grad():
        wanted, got = (m(tokens()[:1]).logits.double() for m in (float_model, model))
    assert level(model) == pytest.approx(float(10 * torch.log10(wanted.pow(2).sum() / (wanted - got).pow(2).sum())), abs=1e-3)
    divergence = (wanted.softmax(-1) * (wanted.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean()
    assert found.kl == pytest.approx(float(divergence), rel=1e-3)
    assert found.top1 == float((wanted.argmax(-1) == got.argmax(-1)).double().mean())
    assert not found.held_out
    summary = quantkit.report(model).summary
    assert f"{found.sqnr_db:.1f} dB" in summary
    assert "KL" in summary
    assert Report.from_dict(quantkit.report(model).to_dict()) == quantkit.report(model)
    old = quantkit.report(model).to_dict()
    del old["verification"]
    assert Report.from_dict(old).verification is None


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "llm_int8"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static-asym", "w4a4", "w8a8-static-pertensor"])
def test_nothing_false(method: str, scheme: str) -> None:
    """Coarse formats are far from the float model, and their layers say so."""
    model = quantkit.quantize(llama(), method, scheme=scheme, calibration=[tokens(4, 48)], progress=False)
    expected = found_in(model).expected_db
    assert expected is not None
    assert abs(level(model) - expected) < 10


def test_without_data_a_few_tokens_are_enough() -> None:
    model = quantkit.quantize(llama(), "rtn", progress=False)
    report = quantkit.report(model)
    assert found_in(model).expected_db is not None
    assert (report.calibration, report.calibration_sha256) == ("not needed", None)
    assert all(layer.sqnr_db is not None for layer in report.layers if layer.kind == "int8")


def test_in_floating_point_the_same_function() -> None:
    model = quantkit.quantize(llama(), scheme=None, calibration=[tokens()], progress=False)
    assert found_in(model).expected_db is None
    assert level(model) > 90


def test_a_batch_is_held_out_where_there_are_enough() -> None:
    seen: list[float] = []
    data = [normal(4, 16, seed=seed) for seed in range(ENOUGH)]
    model = mlp()
    model.register_forward_pre_hook(lambda module, args: seen.append(float(args[0].sum())))
    quantkit.quantize(model, calibration=data, progress=False)
    assert found_in(model).held_out
    assert seen.count(float(data[0].sum())) > seen.count(float(data[-1].sum())) > 0
    few = quantkit.quantize(mlp(), calibration=data[:-1], progress=False)
    assert not found_in(few).held_out


class Dice(nn.Module):
    """Random even in eval mode, as some speech models are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x + torch.randn_like(x)).relu())


def test_random_models_are_run_with_the_same_numbers() -> None:
    model = quantkit.quantize(Dice().eval(), "rtn", calibration=[normal(16, 32)], progress=False)
    assert level(model) > 25


class Nothing(nn.Module):
    """Returns no floating-point tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).argmax(-1)


def test_without_a_floating_point_output_the_model_runs_at_least() -> None:
    model = quantkit.quantize(Nothing().eval(), "rtn", calibration=[normal(16, 32)], progress=False)
    assert found_in(model).sqnr_db is None
    assert "no floating-point output" in quantkit.report(model).summary


def test_not_a_number_is_no_distance() -> None:
    """Outputs that were infinite before, such as masked logits, agree; what becomes NaN is an error."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.up(x).relu()).clone()
            y[..., 0] = -math.inf
            return y

    model = quantkit.quantize(Masked().eval(), "rtn", calibration=[normal(16, 32)], progress=False)
    assert level(model) > 25


def test_an_interruption_of_the_check_leaves_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 where float weights are gone already, with what was rotated before; else the float model."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    built = loud_llama()
    wanted = quantkit.quantize(copy.deepcopy(built), ["rotate", "rtn"], calibration=[tokens()], progress=False)
    monkeypatch.setattr(quantize, "verified", interrupted)
    for bytes_, is_float in ((2**30, True), (1000, False)):
        monkeypatch.setattr(guard, "KEPT_BYTES", bytes_)
        model = copy.deepcopy(built)
        before = state(model)
        with pytest.raises(KeyboardInterrupt):
            quantkit.quantize(model, ["rotate", "rtn"], calibration=[tokens()], progress=False)
        if is_float:
            assert_same(state(model), before)
        else:
            assert_same(dict(model.state_dict()), dict(wanted.state_dict()))
