"""LLMInt8: calibrated outlier columns, and the threshold of the paper against its definition."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quantkit
from quantkit import LLMInt8, MethodError, SmoothQuant, W8A8Linear
from quantkit.core.weights import quantize_weight

pytestmark = pytest.mark.usefixtures("found_once")

HOT = [3, 17, 40]


class Net(nn.Module):
    """A norm with a few loud channels before two linears, as language models have them."""

    def __init__(self, width: int = 64, loud: float = 60.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 96), nn.Linear(96, width)
        with torch.no_grad():
            self.norm.weight[HOT] *= loud

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def data(width: int = 64) -> list[Tensor]:
    return [torch.randn(4, 32, width) for _ in range(3)]


def error(model: nn.Module, wanted: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("method", [LLMInt8(3), [SmoothQuant(), LLMInt8(3)], [LLMInt8(3), SmoothQuant()]], ids=str)
def test_outliers_stay_exact(method: object) -> None:
    model, batches, x = Net(), data(), torch.randn(2, 50, 64)
    wanted = model(x)
    rtn = quantkit.quantize(copy.deepcopy(model), "rtn", calibration=batches, progress=False)
    ours = quantkit.quantize(copy.deepcopy(model), method, calibration=batches, progress=False)
    assert error(ours, wanted, x) < 0.35 * error(rtn, wanted, x)


def test_the_loud_channels_are_found_and_left_out() -> None:
    model = Net()
    weight = model.up.weight.detach().clone()
    up = quantkit.quantize(model, LLMInt8(3), calibration=data(), progress=False).up
    assert isinstance(up, W8A8Linear)
    assert up.outlier_index is not None
    assert up.outlier_index.tolist() == HOT
    assert_same(up.outlier_weight, weight[:, HOT])  # as they were
    assert not up.weight[:, HOT].any()
    rest = weight.index_fill(1, torch.tensor(HOT), 0)
    codes, scale = quantize_weight(rest)
    assert_same(up.weight, codes)
    assert_same(up.weight_scale, scale)  # no scale sees them


def test_the_scale_of_a_token_does_not_see_them() -> None:
    up = quantkit.quantize(Net(), LLMInt8(3), calibration=data(), progress=False).up
    x = torch.randn(5, 64)
    loud = x.clone()
    loud[:, HOT] += 1e4
    difference = up(loud) - up(x)
    torch.testing.assert_close(difference, (loud - x)[:, HOT] @ up.outlier_weight.t(), rtol=1e-3, atol=1e-2)


def test_auto_keeps_none_where_none_are_worth_it() -> None:
    model = quantkit.quantize(Net(1024, loud=1.0), LLMInt8(), calibration=data(1024), progress=False)
    assert model.up.outlier_index is None


def test_auto_keeps_some_where_they_are() -> None:
    model = quantkit.quantize(Net(256), LLMInt8(), calibration=data(256), progress=False)
    assert set(HOT) <= set(model.up.outlier_index.tolist())
    assert len(model.up.outlier_index) in (16, 32, 64)


def test_a_token_is_the_same_in_every_batch() -> None:
    for columns in (3, 32):
        up = quantkit.quantize(Net(), LLMInt8(columns), calibration=data(), progress=False).up
        x = torch.randn(40, 64)
        for backend in ("reference", "cpu"):
            with quantkit.use_backend(backend):
                assert_same(torch.cat([up(row[None]) for row in x]), up(x))


@pytest.mark.parametrize("method", [LLMInt8(3), LLMInt8(threshold=6.0)], ids=str)
def test_saved_and_loaded(method: LLMInt8, tmp_path: Path) -> None:
    model, x = Net(), torch.randn(2, 9, 64)
    model = quantkit.quantize(model, method, calibration=data(), progress=False)
    quantkit.save(model, tmp_path / "out")
    again = quantkit.load(tmp_path / "out", model=Net())
    assert_same(again(x), model(x))
    assert again.up.threshold == model.up.threshold


@pytest.mark.parametrize("method", [LLMInt8(3), LLMInt8(threshold=6.0)], ids=str)
def test_compiled_whole(method: LLMInt8) -> None:
    model = quantkit.quantize(Net(), method, calibration=data(), progress=False)
    x = torch.randn(3, 7, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", ["6", 6, 0.0, -6.0, float("nan"), float("inf")], ids=repr)
def test_thresholds_that_cannot_be(threshold: object) -> None:
    """Of somebody's own calibrator."""

    class Own(quantkit.PerSite):
        name, stage = "own", quantkit.Stage.OUTLIERS

        def plan_site(self, site: object) -> tuple[quantkit.Transform, dict[str, object]]:
            return quantkit.Transform(threshold=threshold), {}  # type: ignore[arg-type]

    with pytest.raises(MethodError, match="threshold is"):
        quantkit.quantize(Net(), Own(), calibration=data(), progress=False)


# ---- the paper's threshold


def paper(x: Tensor, layer: W8A8Linear, threshold: float) -> Tensor:
    """Section 3 of the paper, column by column, in float64."""
    codes, scale = layer.weight.double(), layer.weight_scale.double()
    y = torch.zeros(len(x), layer.out_features, dtype=torch.float64)
    large = [j for j in range(x.shape[1]) if bool((x[:, j].abs() >= threshold).any())]
    for j in large:
        y += x[:, j : j + 1].double() * (codes[:, j] * scale[:, 0])
    rest = x.clone().double()
    rest[:, large] = 0
    for i, row in enumerate(rest):
        step = row.abs().max() / 127
        if step > 0:
            y[i] += (torch.round(row / step) * step) @ (codes * scale).t()
    return y + (0 if layer.bias is None else layer.bias.double())


def layer_with(n: int, k: int, threshold: float, bias: bool = True) -> W8A8Linear:
    linear = nn.Linear(k, n, bias=bias)
    codes, scale = quantize_weight(linear.weight.detach())
    layer = W8A8Linear.from_float(linear, codes=codes, weight_scale=scale, bias=linear.bias)
    layer.threshold = threshold
    return layer


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 70), st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.booleans())
def test_threshold_is_the_papers(m: int, n: int, k: int, share: float, bias: bool) -> None:
    layer = layer_with(n, k, 6.0, bias)
    x = torch.randn(m, k).clamp(-5, 5)
    x = torch.where(torch.rand(m, k) < share, x.sign() * (6 + x.abs() * 10), x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), paper(x, layer, 6.0), rtol=2e-2, atol=2e-2 * k**0.5 / 10)


def test_the_border_belongs_to_the_outliers() -> None:
    layer = layer_with(4, 8, 6.0, bias=False)
    x = torch.zeros(1, 8)
    x[0, 2], x[0, 3] = 6.0, -1.0
    wanted = 6.0 * layer.dequantized_weight()[:, 2] - layer.dequantized_weight()[:, 3]
    torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-5, atol=1e-6)


def test_neighbours_matter_as_the_paper_has_it() -> None:
    layer = layer_with(8, 32, 6.0)
    quiet, loud = torch.randn(1, 32).clamp(-5, 5), torch.full((1, 32), 7.0)
    together = layer(torch.cat([quiet, loud]))[:1]
    torch.testing.assert_close(
        together, nn.functional.linear(quiet, layer.dequantized_weight(), layer.bias), rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(together, layer(quiet))


def test_not_a_number_and_nothing_at_all() -> None:
    layer = layer_with(8, 32, 6.0)
    x = torch.randn(4, 32).clamp(-5, 5)
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    y = layer(x)
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[0].isfinite().all()
    assert layer(x[:0]).shape == (0, 8)


@pytest.mark.parametrize(
    "options",
    [{"columns": -1}, {"columns": 1.5}, {"columns": True}, {"columns": "many"}, {"threshold": 0}, {"threshold": -6.0},
     {"threshold": float("nan")}, {"threshold": float("inf")}, {"threshold": "6"}, {"columns": 16, "threshold": 6.0}],
    ids=str,
)  # fmt: skip
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=r"columns|threshold"):
        LLMInt8(**options)
