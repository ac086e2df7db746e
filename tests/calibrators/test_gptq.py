"""GPTQ: against the definition of optimal brain surgery, the moment under transforms, and what it says when it gives up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_same, gpt2, llama, mlp, normal, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import quantkit
from quantkit import (
    GPTQ,
    RPTQ,
    Hadamard,
    Hessian,
    LLMInt8,
    MethodError,
    Rotation,
    SmoothQuant,
    Stage,
    Transform,
    W8A8Linear,
)
from quantkit.calibrators.gptq import dampings, inverse_factor, round_columns
from quantkit.calibrators.noise import CLIPS, best_clip
from quantkit.core.formats import Int, PerChannel, PerTensor, Quantized
from quantkit.core.numerics import absmax_scale, decode, encode, qmax
from quantkit.core.scheme import Scheme
from quantkit.core.weights import quantize_weight

pytestmark = pytest.mark.usefixtures("found_once")


def surgery(weight: Tensor, absmax: Tensor, moment: Tensor, order: list[int], bits: int) -> Tensor:
    """Codes by the definition: after each column, the columns not yet rounded move to the least squares optimum."""
    w, h = weight.double(), moment.double()
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    for step, j in enumerate(order):
        codes[:, j : j + 1] = encode(w[:, j : j + 1].float(), absmax, bits)
        error = w[:, j : j + 1] - decode(codes[:, j : j + 1], absmax_scale(absmax, bits)).double()
        rest = order[step + 1 :]
        if rest:
            w[:, rest] += error @ torch.linalg.solve(h[rest][:, rest], h[rest, j])[None]
    return codes


def correlated(count: int, channels: int, seed: int = 0) -> Tensor:
    """Tokens ``[count, channels]`` whose channels know of one another."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=random) / channels**0.5 + torch.eye(channels)
    return torch.randn(count, channels, generator=random) @ mix * torch.rand(channels, generator=random).mul(3).exp()


def damped(moment: Tensor, share: float) -> Tensor:
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "channels"), [(5, 24), (3, 150), (1, 1)])
def test_blocks_are_optimal_brain_surgery(rows: int, channels: int, bits: int) -> None:
    """150 columns are more than one block. Codes may differ where a value falls on the border of two."""
    x = correlated(400, channels)
    moment, weight = x.T @ x, torch.randn(rows, channels)
    absmax = weight.abs().amax(1, keepdim=True)
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor, damping = inverse_factor(moment, order, 0.01)
    assert damping == 0.01
    assert factor is not None
    got = round_columns(weight, absmax, factor, order, Quantized(Int(bits)))
    wanted = surgery(weight, absmax, damped(moment, 0.01), order.tolist(), bits)
    assert (got.codes != wanted).float().mean() < 0.01
    assert_same(got.scale, absmax_scale(absmax, bits))


@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 20), st.integers(1, 140))
def test_codes_are_codes(seed: int, bits: int, rows: int, channels: int) -> None:
    """Of any weight, with dead columns and rows of zeros, and fewer tokens than channels."""
    random = torch.Generator().manual_seed(seed)
    x = correlated(9, channels, seed).masked_fill(torch.rand(channels, generator=random) < 0.3, 0.0)
    weight = torch.randn(rows, channels, generator=random).masked_fill(torch.rand(rows, 1, generator=random) < 0.2, 0.0)
    absmax = weight.abs().amax(1, keepdim=True)
    moment = x.T @ x
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor, _ = inverse_factor(moment, order, 0.01)
    assert factor is not None
    got = round_columns(weight, absmax, factor, order, Quantized(Int(bits)))
    assert int(got.codes.abs().max()) <= qmax(bits)
    assert not got.codes[absmax[:, 0] == 0].any()
    dead = moment.diagonal() == 0
    nearest, _ = quantize_weight(weight, bits)
    assert_same(got.codes[:, dead], nearest[:, dead])  # nothing says to move them, and they move nothing


ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(0))
SCALE = normal(16, seed=1).exp()
TRANSFORMS: dict[str, Transform] = {
    "scale": Transform(scale=SCALE),
    "shift": Transform(shift=normal(16)),
    "permutation": Transform(permutation=ORDER),
    "outliers": Transform(outliers=torch.tensor([3, 9])),
    "rotation": Transform(rotation=Rotation(8, torch.tensor([1.0, -1.0] * 8))),
    "all": Transform(normal(16), SCALE, torch.tensor([0, 7]), ORDER, Rotation(16, torch.ones(16))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_moment_follows_transforms(name: str) -> None:
    """As if the transformed activation had been seen."""
    x, transform = correlated(500, 16) + 3, TRANSFORMS[name]
    before, after = Hessian(16), Hessian(16)
    before.update(x)
    after.update(transform.activation(x)[0])
    got = before.after(transform)
    torch.testing.assert_close(got.moment, after.moment, rtol=1e-5, atol=1e-4 * float(after.moment.abs().max()))
    torch.testing.assert_close(got.total, after.total, rtol=1e-6, atol=1e-4)
    assert (got.count, got.held.seen) == (after.count, after.held.seen) == (429, 71)
    for ours, theirs in zip(got.held.weighted(), after.held.weighted(), strict=True):
        torch.testing.assert_close(ours.sum(0), theirs.sum(0), rtol=1e-5, atol=1e-3)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_moment_does_not_see_the_split(sizes: list[int]) -> None:
    x = correlated(sum(sizes), 8).round()  # whole numbers, of which float32 adds up squares exactly in any order
    whole, parts = Hessian(8), Hessian(8)
    whole.update(x)
    for part in x.split(sizes):
        parts.update(part)
    torch.testing.assert_close(parts.moment, whole.moment)
    assert (parts.count, parts.held.seen) == (whole.count, whole.held.seen)
    merged = whole.merge(parts)
    torch.testing.assert_close(merged.moment, 2 * whole.moment)
    assert (merged.count, merged.held.seen) == (2 * whole.count, 2 * whole.held.seen)


def test_tokens_that_judge_are_not_those_that_fit() -> None:
    x = torch.eye(70).repeat_interleave(7, 0)  # token 7 i + 6 is the last of its kind
    seen = Hessian(70)
    seen.update(x)
    assert_same(seen.moment, 6.0 * torch.eye(70))
    assert_same(seen.held.weighted()[0].sum(0), torch.ones(70))


class Correlated(nn.Module):
    """A site whose channels know of one another, as GPTQ likes it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(width, 48), nn.Linear(width, 16), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.q(x), self.k(x)], -1).tanh())


def error(model: nn.Module, wanted: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "before",
    [[], [SmoothQuant(0.5)], [LLMInt8(8)], [SmoothQuant(0.5), LLMInt8(8), Hadamard(seed=1)], [RPTQ(clusters=3, tile=16)]],
    ids=["alone", "smoothquant", "llm_int8", "all", "clusters"],
)
@pytest.mark.parametrize("scheme", ["w4a8", "w3a8-asym", "w4a8-pertensor", "w4a8-static"])
def test_better_than_nearest(before: list[Any], scheme: str) -> None:
    model, x = Correlated(), correlated(3000, 64) / 8
    batches, fresh = list(x[:2500].split(100)), x[2500:]
    with torch.no_grad():
        wanted = model(fresh)
    nearest = quantkit.quantize(copy.deepcopy(model), [*before, "rtn"], scheme=scheme, calibration=batches, progress=False)
    for method in (GPTQ(), GPTQ(clip=False)):
        ours = quantkit.quantize(copy.deepcopy(model), [*before, method], scheme=scheme, calibration=batches, progress=False)
        assert error(ours, wanted, fresh) < 0.95 * error(nearest, wanted, fresh)
    assert all(layer.notes["gptq error"] < 0.9 for layer in quantkit.report(ours).layers if layer.kind == "int8")


@pytest.mark.parametrize("make", [llama, gpt2, lambda: mlp(outliers=True)], ids=["llama", "gpt2", "mlp"])
def test_any_model(make: Any) -> None:
    model = make()
    batches = [normal(2, 40, 16, seed=i) if hasattr(model, "norm") else tokens(2, 40, seed=i) for i in range(4)]
    ours = quantkit.quantize(copy.deepcopy(model), ["smoothquant", "gptq"], calibration=batches, progress=False)
    again = quantkit.quantize(copy.deepcopy(model), ["smoothquant", "gptq"], calibration=batches, progress=False)
    assert_same(ours.state_dict(), again.state_dict())
    assert any(isinstance(m, W8A8Linear) for m in ours.modules())


def test_linears_that_lose_are_rounded_to_nearest() -> None:
    """Held-out tokens that have nothing to do with the others: what GPTQ learned is wrong for them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 32))
    fit, judge = correlated(600, 32), torch.zeros(100, 32)
    judge[:, ::2] = correlated(100, 16, seed=5)
    fit[:, ::2] *= 0.01
    x = torch.cat([torch.cat([fit[6 * i : 6 * i + 6], judge[i : i + 1]]) for i in range(100)])
    plain = copy.deepcopy(model)
    quantkit.quantize(model, GPTQ(clip=False), scheme="w4a8", calibration=[x], targets=["0"], progress=False)
    record = next(layer for layer in quantkit.report(model).layers if layer.kind == "int8")
    assert record.notes == {"gptq": "no better on held-out tokens, rounded to nearest: 0"}
    quantkit.quantize(plain, "rtn", scheme="w4a8", calibration=[x], targets=["0"], progress=False)
    assert_same(model.state_dict(), plain.state_dict())


def test_too_few_tokens() -> None:
    model = Correlated()
    quantkit.quantize(model, "gptq", calibration=[torch.randn(4, 64)], progress=False)
    assert "fewer than 7 tokens" in quantkit.report(model).layers[0].notes["gptq"]


def test_damping_rises_until_it_works() -> None:
    assert list(dampings(0.01)) == pytest.approx([0.01, 0.1, 1.0])
    assert list(dampings(1)) == [1.0]
    order = torch.arange(4)
    indefinite = torch.diag(torch.tensor([4.0, 1.0, 1.0, -0.5]))  # rounding errors may do this, and worse
    indefinite[3, 3], indefinite[2, 3], indefinite[3, 2] = 0.5, 0.8, 0.8
    factor, damping = inverse_factor(indefinite, order, 0.001)
    assert factor is not None
    assert damping == pytest.approx(0.1)
    assert inverse_factor(-torch.ones(4, 4) + torch.eye(4), order, 0.01)[0] is None
    assert inverse_factor(torch.full((4, 4), float("inf")), order, 0.01)[0] is None
    zeros, _ = inverse_factor(torch.zeros(4, 4), order, 0.01)
    assert zeros is not None
    assert zeros.isfinite().all()


def test_a_moment_that_cannot_be_inverted_is_told() -> None:
    """Values whose squares float32 does not hold."""
    model = Correlated()
    quantkit.quantize(model, "gptq", calibration=[torch.randn(50, 64) * 1e25], targets=["q", "k"], progress=False)
    assert {layer.notes["gptq"] for layer in quantkit.report(model).layers if layer.kind == "int8"} == {
        "no: the second moment cannot be inverted, rounded to nearest"
    }


def test_learned_grids_are_kept() -> None:
    """A calibrator before it may choose the grid."""

    class Half:
        name, stage, statistics = "half", Stage.SCALE, ()

        def plan(self, view: Any) -> quantkit.Plan:
            rows = {name: len(w) for site in view.sites for name, w in site.weights()}
            return quantkit.Plan(clips={name: torch.full((n, 1), 0.5) for name, n in rows.items()})

    model, x = Correlated(), correlated(500, 64) / 8
    top = model.q.weight.detach().abs().amax(1, keepdim=True)
    for last in ("rtn", "gptq"):
        ours = quantkit.quantize(copy.deepcopy(model), [Half(), last], calibration=[x], progress=False)
        assert_same(ours.q.weight_scale, absmax_scale(top * 0.5))
        assert int(ours.q.weight.abs().max()) == 127

    class Late(quantkit.PerSite):
        name, stage = "late", Stage.OUTLIERS

        def plan_site(self, site: Any) -> Any:
            return Transform(outliers=torch.tensor([1])), {}

    with pytest.raises(MethodError, match="put late first"):
        quantkit.quantize(model, [Half(), Late()], calibration=[x], progress=False)


@pytest.mark.parametrize("clip", [torch.ones(48), torch.zeros(48, 1), torch.full((48, 1), 1.5), torch.ones(48, 1).double()])
def test_clips_that_cannot_be(clip: Tensor) -> None:
    class Wrong:
        name, stage, statistics = "wrong", Stage.SCALE, ()

        def plan(self, view: Any) -> quantkit.Plan:
            return quantkit.Plan(clips={"q": clip})

    with pytest.raises(MethodError, match="clipped 'q'"):
        quantkit.quantize(Correlated(), Wrong(), calibration=[torch.randn(20, 64)], progress=False)


@pytest.mark.parametrize("options", [{"damping": 0}, {"damping": 2.0}, {"damping": True}, {"damping": "a"}, {"clip": 1}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="GPTQ"):
        GPTQ(**options)


def test_order() -> None:
    with pytest.raises(MethodError, match="rounding comes last"):
        quantkit.quantize(Correlated(), ["gptq", "smoothquant"], calibration=[torch.randn(20, 64)])
    with pytest.raises(MethodError, match="both choose the integers"):
        quantkit.quantize(Correlated(), ["gptq", "rtn"], calibration=[torch.randn(20, 64)])


@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
def test_best_clip(seed: int, bits: int, per_tensor: bool) -> None:
    """Of all shares tried, none has less error, the whole row included; with one scale for all rows they agree."""
    random = torch.Generator().manual_seed(seed)
    weight, size = torch.randn(6, 30, generator=random) ** 3, torch.rand(30, generator=random)
    scheme = Scheme(Quantized(Int(bits), PerTensor() if per_tensor else PerChannel()))

    def error(clip: Tensor) -> Tensor:
        codes, scale = quantize_weight(weight, bits, per_tensor=per_tensor, clip=clip)
        rows = (decode(codes, scale) - weight) ** 2 @ size
        return rows.sum() if per_tensor else rows

    best = best_clip(weight, size, scheme)
    assert not per_tensor or len(best.unique()) == 1
    for share in CLIPS:
        assert bool((error(best) <= error(torch.full((6, 1), share)) * (1 + 1e-6)).all())
