"""RMSNorms as one kernel, which Triton's interpreter runs here."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("triton")

import quantkit
from quantkit.layers import norm as fused
from quantkit.layers.norm import Form, FusedNorm, form_of
from quantkit.ops.gpu.step import norm as kernel

HALF = torch.float16  # which the interpreter rounds as GPUs do


class Shared(nn.Module):
    """Its gain is a parameter of another name, and its output is one of several."""

    def __init__(self, several: bool) -> None:
        super().__init__()
        self.g, self.small, self.several = nn.Parameter(torch.ones(32)), 1e-5, several

    def forward(self, x: Tensor) -> Any:
        y = self.g * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.small)).to(x.dtype)
        return (y, x) if self.several else y


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


NORMS = {
    "llama": lambda: LlamaRMSNorm(32), "gemma": lambda: GemmaRMSNorm(32), "torch": lambda: nn.RMSNorm(32, 1e-5),
    "own": lambda: Shared(False),
}  # fmt: skip
OTHERS = {
    "layer": (lambda: nn.LayerNorm(32), "more than a gain"),
    "centred": (lambda: Centred(32), "no RMSNorm"),
    "several": (lambda: Shared(True), "does not take one tensor and give another"),
    "eps of the dtype": (lambda: nn.RMSNorm(32), "no RMSNorm"),
    "on no device": (lambda: LlamaRMSNorm(32).to("meta"), "not in memory"),
    "long": (lambda: LlamaRMSNorm(2**15 + 1), "rows have 32769 channels"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), "more than a gain"),
}  # fmt: skip


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the kernels run on the CPU; a list that grows with each norm they run."""
    ran: list[int] = []
    plain = kernel.norm

    def counted(x: Tensor, *args: Any) -> Any:
        ran.append(len(x))
        return plain(x, *args)

    monkeypatch.setattr(kernel, "norm", counted)
    monkeypatch.setattr(fused.devices, "why_not", lambda device: None)
    return ran


def made(kind: str, dtype: torch.dtype = HALF) -> Any:
    norm = NORMS[kind]()
    with torch.no_grad():
        gain = next(norm.parameters())
        gain.copy_(torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5)
    return norm.to(dtype)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


@pytest.mark.parametrize("kind", NORMS)
@torch.no_grad()
def test_they_give_what_they_gave(kind: str, launches: list[int]) -> None:
    norm = made(kind)
    inputs = random(2, 5, 32), random(1, 32), random(7, 64)[:, :32], 1e-3 * random(3, 1, 4, 32), torch.zeros(2, 32, dtype=HALF)
    wanted = [norm(x) for x in inputs]
    quantkit.fuse_norms(norm)
    for x, w in zip(inputs, wanted, strict=True):
        y = norm(x)
        torch.testing.assert_close(y, w, rtol=2**-9, atol=1e-6)
        assert y.shape == x.shape
        assert y.is_contiguous()
    assert launches == [10, 1, 7, 12, 2]


@given(st.sampled_from(sorted(NORMS)), st.sampled_from([torch.float32, torch.bfloat16, HALF]))
def test_what_they_compute_is_told_by_trying(kind: str, dtype: torch.dtype) -> None:
    form = form_of(made(kind, dtype))
    assert isinstance(form, Form)
    assert (form.offset, form.late) == (float(kind == "gemma"), kind in ("gemma", "torch"))


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_left_alone(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="quantkit")
    make, why = OTHERS[kind]
    norm = make()
    assert why in str(form_of(norm))
    model = nn.Sequential(norm)
    assert quantkit.fuse_norms(model) is model
    assert "0 norms of Sequential run as one kernel" in caplog.text
    assert "forward" not in vars(norm)
    assert (why in caplog.text) == ("norm" in type(norm).__name__.lower())


def test_some_calls_run_as_written(launches: list[int]) -> None:
    norm = quantkit.fuse_norms(made("llama"))
    plain, x = copy.deepcopy(quantkit.unfuse_norms(copy.deepcopy(norm))), random(3, 32)
    y = norm(x)  # with gradients
    assert y.requires_grad
    calls: tuple[Callable[[Any], Tensor], ...] = (
        lambda m: m(hidden_states=x), lambda m: m(x.float()), lambda m: m(x[:0]), lambda m: torch.func.vmap(m)(x),
        lambda m: m(x.t().contiguous().t()), lambda m: torch.compile(m, backend="eager")(x),
    )  # fmt: skip
    with torch.no_grad():
        for call in calls:
            assert torch.equal(call(norm), call(plain))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(norm(x), plain(x))
        assert not launches
        norm(x)
        with torch.autocast("cpu", torch.bfloat16):  # also once it has run as a kernel
            assert torch.equal(norm(x), plain(x))
        assert launches.pop() == 3
        with pytest.raises(RuntimeError, match="size"):
            norm(random(3, 31))
    assert not launches


@torch.no_grad()
def test_numbers_that_change(launches: list[int]) -> None:
    """Gains are read when the norm is called; another eps is another norm."""
    norm, x = quantkit.fuse_norms(made("llama")), random(3, 32)
    once = norm(x)
    norm.weight.mul_(2)
    assert torch.equal(norm(x), 2 * once)
    norm.weight.data = norm.weight.data * 2
    assert torch.equal(norm(x), 4 * once)
    norm.load_state_dict({"weight": norm.weight / 4})
    assert torch.equal(norm(x), once)
    norm.weight = nn.Parameter(norm.weight * 8)
    assert torch.equal(norm(x), 8 * once)
    assert torch.equal(torch.func.functional_call(norm, {"weight": norm.weight / 2}, x), 4 * once)
    assert len(launches) == 6
    norm.variance_epsilon = 10.0
    assert torch.equal(norm(x), quantkit.unfuse_norms(copy.deepcopy(norm))(x))
    assert len(launches) == 6


@torch.no_grad()
def test_copies_hooks_and_states(launches: list[int]) -> None:
    model = nn.Sequential(made("llama"), made("gemma"), nn.LayerNorm(32, dtype=HALF))
    names = list(model.state_dict())
    quantkit.fuse_norms(quantkit.fuse_norms(model))
    assert list(model.state_dict()) == names
    x, seen = random(3, 32), list[Any]()
    model[0].register_forward_hook(lambda *args: seen.append(args[2]))
    y = model(x)
    assert len(seen) == 1
    copied = copy.deepcopy(model)
    copied[0].weight.zero_()
    assert torch.equal(model(x), y)
    assert vars(copied[0])["forward"].module is copied[0]
    file = io.BytesIO(pickle.dumps(model[1]))
    assert torch.equal(pickle.load(file)(seen[0]), model[1](seen[0]))
    quantkit.unfuse_norms(model)
    assert not any(isinstance(vars(m).get("forward"), FusedNorm) for m in model)
    assert len(launches) == 2 * 2 + 1 + 1


def test_a_quantized_model(launches: list[int]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(12).view(1, 12)
    quantkit.quantize(model, "smoothquant", calibration=[ids], progress=False)
    with torch.no_grad():
        wanted = model(ids).logits
        quantkit.fuse_norms(model)
        got = model(ids).logits
    assert len(launches) == 5
    assert float((got - wanted).norm() / wanted.norm()) < 0.02


@torch.no_grad()
def test_captured_steps_look_through_them(launches: list[int]) -> None:
    model = nn.Sequential(made("llama", torch.float32), nn.Linear(32, 32))
    plain = copy.deepcopy(model)
    quantkit.fuse_norms(model)
    step = quantkit.CapturedStep(model, model)
    for seed in range(3):
        x = random(2, 32, seed=seed).float()
        torch.testing.assert_close(step(x), plain(x), rtol=1e-5, atol=1e-6)
    assert not launches
