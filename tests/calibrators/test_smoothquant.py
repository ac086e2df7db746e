"""SmoothQuant by hand, on dead channels, under ties, and against plain rounding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import WIDTH, assert_same, llama, mlp, normal, outputs, quantized, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quantkit
from quantkit import (
    MethodError,
    Range,
    Scheme,
    SmoothQuant,
    TokenSample,
    Transform,
)
from quantkit.calibration.observe import observe
from quantkit.calibrators import SiteView
from quantkit.calibrators.smoothquant import DEAD, smooth_scale
from quantkit.model.modules import linears_of

pytestmark = pytest.mark.usefixtures("found_once")

EPS = 2.0**-24


def test_smoothquant_by_hand() -> None:
    """Paper, equation 4: s = a**0.5 / w**0.5; the norm is divided by s and the columns of its reader multiplied."""
    model, data = mlp(outliers=True), normal(3, 8, 16)
    old = copy.deepcopy(model)
    with torch.no_grad():
        hidden = old.norm(data)
        wide = old.up(hidden).relu()
    s1 = (hidden.abs().amax((0, 1)) / old.up.weight.abs().amax(0)).sqrt()
    s2 = (wide.abs().amax((0, 1)) / old.down.weight.abs().amax(0)).sqrt()
    assert (wide.amax((0, 1)) > 0).all()  # no dead channel among them
    quantized(model, SmoothQuant(alpha=0.5), scheme=None, calibration=list(data.split(1)))
    close = {"rtol": 16 * EPS, "atol": 0.0}  # two powers, a quotient and a product or two
    torch.testing.assert_close(model.norm.weight, old.norm.weight / s1, **close)
    torch.testing.assert_close(model.norm.bias, old.norm.bias / s1, **close)
    torch.testing.assert_close(model.up.weight, old.up.weight * s1 / s2[:, None], **close)
    torch.testing.assert_close(model.up.bias, old.up.bias / s2, **close)
    torch.testing.assert_close(model.down.weight, old.down.weight * s2, **close)


def views(model: nn.Module, batch: Tensor) -> list[SiteView]:
    found, linears = quantkit.discover(model, batch), linears_of(model)
    statistics = observe(model, [batch], found.sites, [Range, TokenSample], progress=False)
    return [
        SiteView(s, Scheme(), False, Transform(), {n: linears[n] for n in s.linears}, statistics[s.name]) for s in found.sites
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_twice_is_smoothing_once(alpha: float) -> None:
    for view in views(llama(), tokens()):
        first = SmoothQuant(alpha).plan_site(view)[0]
        assert (first.scale - 1).abs().max() > 0.01
        view.transform = view.transform.then(first)
        again = SmoothQuant(alpha).plan_site(view)[0].scale
        torch.testing.assert_close(again, torch.ones_like(again), rtol=64 * EPS, atol=0)


def test_repeated_heads_share_a_scale() -> None:
    """Grouped-query attention: two query heads read one row of v, so their channels must agree on a scale."""
    shared = [view for view in views(llama(), tokens()) if view.site.producer and view.site.producer.module.endswith("v_proj")]
    assert len(shared) == 2
    for view in shared:
        rows = view.site.producer.rows
        assert rows.unique().numel() == WIDTH // 2
        for alpha in (0.5, "auto"):
            scale = SmoothQuant(alpha).plan_site(view)[0].scale
            assert_same(scale, view.site.tie(scale))


def test_dead_and_unread_channels() -> None:
    a, w = torch.tensor([0.0, DEAD / 2, 8.0, 1.0, 1.0, 0.5, 0.25]), torch.tensor([1.0, 1.0, 0.0, 4.0, 1.0, 0.0, 1.0])
    median = 0.5
    assert smooth_scale(a, w, 0.5).tolist() == [1, 1, 8 / median, 0.5, 1, 1, 0.5]
    for alpha in (0.0, 0.5, 1.0):
        for zeros in (torch.zeros(7), a * 0):
            assert_same(smooth_scale(zeros, w, alpha), torch.ones(7))  # all dead
        assert smooth_scale(a, zeros, alpha).isfinite().all()


positive = st.floats(2.0**-40, 2.0**40, width=32)


@given(st.lists(st.tuples(positive | st.just(0.0), positive | st.just(0.0)), min_size=1), st.floats(0, 1))
def test_scales_are_positive_numbers(pairs: list[tuple[float, float]], alpha: float) -> None:
    scale = smooth_scale(*torch.tensor(pairs).T, alpha)
    assert scale.isfinite().all()
    assert (scale > 0).all()


def test_smoothquant_beats_rounding_on_outliers() -> None:
    data, held_out = normal(4, 30, 16), normal(4, 30, 16, seed=9)
    model = mlp(outliers=True)
    wanted = outputs(model, held_out)[0]

    def error(method: str) -> Tensor:
        return (outputs(quantized(copy.deepcopy(model), method, calibration=[data]), held_out)[0] - wanted).norm()

    assert error("smoothquant") < error("rtn")


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "0.5", True, None])
def test_alpha(alpha: Any) -> None:
    with pytest.raises(MethodError, match="alpha"):
        SmoothQuant(alpha=alpha)
