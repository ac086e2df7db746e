"""Every weight matrix of a model is in its report, with its share, and the log warns of what stays float unasked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import llama
from nets import WIDTH, Net, X
from randomised import build
from torch import Tensor, nn

import quantkit
from quantkit.core.report import LayerRecord, Report, percent

pytestmark = pytest.mark.usefixtures("found_once")


class Stacked(nn.Module):
    """Two experts in one parameter, both of which see everything."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.experts[0]) * (x @ self.experts[1])


class Low(nn.Module):
    """A linear of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Doubled(nn.Linear):
    """No linear for whoever would put another one in its place."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Channels(nn.Conv1d):
    """A convolution over tokens, the channels last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mT).mT


class Attention(nn.MultiheadAttention):
    """Attention of a sequence to itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Looked(nn.Embedding):
    """Rows looked up by the signs of the first channel."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input[..., 0] > 0).long())


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


KINDS: dict[str, tuple[Any, str]] = {
    "fused experts": (Stacked, "experts fused in one parameter of a form that is not known: Stacked"),
    "custom linear": (Low, "a weight of Low, which is no linear of PyTorch's"),
    "linear that computes more": (lambda: Doubled(WIDTH, WIDTH), "Doubled computes something else than x W^T + b"),
    "convolution": (lambda: Channels(WIDTH, WIDTH, 3, padding=1), "convolution"),
    "attention of PyTorch": (lambda: Attention(WIDTH, 2, batch_first=True), "nn.MultiheadAttention "),
    "parametrization": (parametrized, "ParametrizedLinear whose weight is no parameter, but computed"),
    "embedding": (lambda: Looked(40, WIDTH), "embedding"),
}


def with_other(kind: str) -> Net:
    """A net in which a module of this kind has a good part of the weights."""
    torch.manual_seed(0)
    return Net(lambda m, x: m.out(m.b(m.a(m.norm(x + m.other(x))))), other=KINDS[kind][0]())


def matrices(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    return [text for text in texts if "stay in floating point" in text]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_linear_is_in_the_report(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, total = with_other(kind), matrices(with_other(kind))
    plan = quantkit.plan(with_other(kind), calibration=[X], progress=False)
    caplog.clear()
    quantkit.quantize(model, calibration=[X], progress=False)
    record = quantkit.report(model)
    others = [r for r in (*record.layers, *record.others) if r.name.startswith("other")]
    assert sorted(r.name for r in record.layers if r not in others) == ["a", "b", "out"]
    assert others
    assert all(r.kind == "float" and r.reason.startswith(KINDS[kind][1]) for r in others)
    assert sum(r.weights for r in (*record.layers, *record.others)) == total
    int8 = [model.get_submodule(r.name) for r in record.layers if r.kind == "int8"]
    share = percent(sum(layer.weight.numel() for layer in int8) / total)
    assert f"{len(int8)} of {len(record.layers)} linears in INT8 ({share} of the weights; " in record.summary
    assert all(f"{r.name} " in str(record) and r.reason in str(record) for r in others)
    assert len(warned(caplog)) == (kind != "embedding")
    assert all("other" in text and KINDS[kind][1] in text for text in warned(caplog))
    for again in (quantkit.convert(with_other(kind), plan, progress=False), quantkit.convert(with_other(kind), plan)):
        assert quantkit.report(again).others == record.others
        assert [r.weights for r in quantkit.report(again).layers] == [r.weights for r in record.layers]
    loaded = quantkit.load(quantkit.save(model, tmp_path / "int8"), model=with_other(kind))
    assert quantkit.report(loaded) == record


@pytest.mark.parametrize("chosen", [{"ignore": ["other", "a"]}, {"targets": ["b"]}], ids=str)
def test_what_users_leave_out_is_no_surprise(chosen: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Net(lambda m, x: m.out(m.b(m.a(m.norm(x + m.other.deep(x))))), other=nn.ModuleDict({"deep": Low()}))
    model.other["free"] = nn.Linear(WIDTH, WIDTH)  # type: ignore[index]  # a linear for the pattern to match
    quantkit.quantize(model, calibration=[X], progress=False, **chosen)
    assert [r.reason for r in quantkit.report(model).others] == ["ignored" if "ignore" in chosen else "not among targets"]
    assert not any("deep" in text for text in warned(caplog))


def test_linears_that_never_ran_are_warned_of_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
    quantkit.quantize(Net(lambda m, x: m.out(m.b(m.a(m.norm(x)))), branches=branches), calibration=[X], progress=False)
    (text,) = warned(caplog)
    assert "branches.* (" in text
    assert "pass calibration data that reaches them" in text


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_count_once(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    total = matrices(model)  # parameters() names a tied one once
    quantkit.quantize(model, progress=False)
    record = quantkit.report(model)
    assert sum(r.weights for r in (*record.layers, *record.others)) == total
    assert [r.name for r in record.others] == ([] if tied else ["model.embed_tokens"])


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w8a8", "w4a8"])
def test_int8_layers_count_codes_however_they_are_stored(scheme: str) -> None:
    model = llama()
    total, linear = matrices(model), model.model.layers[0].mlp.up_proj.weight.numel()
    quantkit.quantize(model, "rtn", scheme=scheme, progress=False)
    record = quantkit.report(model)
    assert next(r.weights for r in record.layers if r.name == "model.layers.0.mlp.up_proj") == linear
    assert sum(r.weights for r in (*record.layers, *record.others)) == total


@pytest.mark.parametrize("options", [{}, {"ignore": ["*.experts.*"]}, {"ignore": ["*.experts.0.*"]}], ids=str)
def test_experts_that_are_taken_apart_count_as_they_are(options: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = build("qwen3-moe")
    total = matrices(model)
    quantkit.quantize(model, calibration=[FAMILIES["qwen3-moe"].batch()], progress=False, **options)
    record = quantkit.report(model)
    assert sum(r.weights for r in (*record.layers, *record.others)) == total
    assert not any("experts" in r.name for r in record.others)
    assert not warned(caplog)


def test_reports_of_older_versions_say_no_shares() -> None:
    record = Report(["rtn"], "w8a8", 0, "given", layers=[LayerRecord("a", "int8"), LayerRecord("b", "float", reason="router")])
    data = record.to_dict()
    del data["others"]
    for layer in data["layers"]:
        del layer["weights"]
    assert Report.from_dict(data) == record
    assert "1 of 2 linears in INT8\n" in record.summary
    assert "%" not in str(record)
