"""Calls of a step in fewer kernels: what is fused, and that it computes the same; in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers import VOCAB, llama, quantized, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import StaticCache

import quantkit
from quantkit import LLMInt8
from quantkit.capture.fuse import Fused
from quantkit.capture.step import Rehearsal

pytest.importorskip("triton")

ROOM = 20
NORMS, SUMS, GATES = "norms and codes", "residual sums, norms and codes", "gates and codes"
BOTH, ALONE, POSITIONS = "residual sums and norms", "norms", "rotary positions"


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


class Decoding:
    """A model behind a prompt, whose cache can be put back to where it was."""

    def __init__(self, model: Any, batch: int) -> None:
        self.model, self.cache = model, StaticCache(config=model.config, max_cache_len=ROOM)
        with torch.no_grad():
            model(input_ids=tokens(batch, 7), past_key_values=self.cache, use_cache=True)
        self.before = self.state()
        self.inputs = [[tokens(batch, 1) + i, torch.full((batch, 1), 7 + i)] for i in range(2)]

    def state(self) -> list[Tensor]:
        return [t.clone() for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [t for layer in self.cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]

    def back(self) -> None:
        for now, old in zip(self._tensors(), self.before, strict=True):
            now.copy_(old)

    def step(self, token: Tensor, position: Tensor) -> Any:
        return self.model(input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True)


def fused_of(model: Any, batch: int, tolerance: float) -> str:
    """What of a step is fused, after a look at two of them."""
    with torch.no_grad():
        decoding = Decoding(model, batch)
        first, second = decoding.inputs
        rehearsal = Rehearsal(decoding.step, first, model)
        wanted = [rehearsal.outputs.logits, decoding.step(*second).logits]
        fused = rehearsal.fused()
        assert rehearsal.refused is None
        assert fused is not None
        decoding.back()
        fused(first, dry=True)
        for now, old in zip(decoding.state(), decoding.before, strict=True):
            assert torch.equal(now, old)
        for inputs, logits in zip(decoding.inputs, wanted, strict=True):
            assert distance(fused(inputs).logits, logits) < tolerance
    return fused.said.partition("fused: ")[2]


def said(**found: int) -> str:
    return ", ".join(f"{name} ({n})" for name, n in found.items())


METHODS: dict[str, tuple[Any, dict[str, int]]] = {
    "float": (None, {ALONE: 1, BOTH: 4}),
    "rtn": ("rtn", {NORMS: 1, SUMS: 4, GATES: 2}),
    "rotation": ("best", {NORMS: 1, SUMS: 4, GATES: 2}),
    "columns": (LLMInt8(columns=2), {ALONE: 1, BOTH: 4}),
    "threshold": (LLMInt8(threshold=2.0), {ALONE: 1, BOTH: 4}),
}


@pytest.mark.parametrize(
    ("method", "batch"),
    [("float", 3), ("rtn", 1), ("rtn", 3), ("rotation", 1), ("columns", 1), ("threshold", 3)],
)
def test_methods(method: str, batch: int) -> None:
    how, found = METHODS[method]
    torch.manual_seed(1)
    model = llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).half()
    if how is not None:
        quantkit.quantize(model, how, heads=True, calibration=[tokens(4, 20)], progress=False)
    with quantkit.use_backend("triton"):
        assert fused_of(model, batch, 3e-2) == said(**{POSITIONS: 4, "attention": 2} | found)


class Block(nn.Module):
    def __init__(self, norm: Callable[[nn.Module, Tensor], Tensor], both: bool = True) -> None:
        super().__init__()
        self.norm, self.both = norm, both
        self.gain = nn.Parameter(torch.rand(64) + 0.5)
        self.a, self.b, self.head = nn.Linear(64, 48), nn.Linear(64, 48), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self, x)
        out: Tensor = self.head(F.gelu(self.a(y), approximate="tanh") * (self.b(y) if self.both else y[:, :48]))
        return out


def written_out(module: Any, x: Tensor) -> Tensor:
    wide = x.float()
    return module.gain * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def changed_after(module: Any, x: Tensor) -> Tensor:
    y = written_out(module, x)
    return y.mul_(2)


def in_place(module: Any, x: Tensor) -> Tensor:
    return written_out(module, x.clone().add_(1))


def gain_after(module: Any, x: Tensor) -> Tensor:
    """As ``1 + weight`` of Gemma, made when the norm is."""
    total = x + x.flip(0)
    wide = total.float()
    return (1 + module.gain) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def gained_by(choose: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def norm(module: Any, x: Tensor) -> Tensor:
        wide = x.float()
        return choose(module.gain) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    return norm


def times(module: Any, x: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.pow(2).mean(-1, keepdim=True)
    return module.gain * (wide * torch.rsqrt(torch.add(mean, 1e-2, alpha=50))).to(x.dtype)


OTHERS = f"shared codes (1), {GATES} (1)"
BLOCKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool, str]] = {
    "written out": (written_out, True, f"{NORMS} (1), {GATES} (1)"),
    "layer norm": (lambda m, x: F.layer_norm(x, (64,), m.gain, None, 1e-5), True, f"{NORMS} (1), {GATES} (1)"),
    "residual": (lambda m, x: written_out(m, x + x.flip(0)), True, f"{SUMS} (1), {GATES} (1)"),
    "no norm": (lambda m, x: x + 1, True, OTHERS),
    "a gain made after the sum": (gain_after, True, f"{NORMS} (1), {GATES} (1)"),
    "a gain for all channels": (gained_by(lambda gain: gain[:1]), True, OTHERS),
    "a gain with gaps": (gained_by(lambda gain: gain.repeat_interleave(2)[::2]), True, OTHERS),
    "gaps, a layer norm": (lambda m, x: F.layer_norm(x, (64,), m.gain.repeat_interleave(2)[::2], None, 1e-5), True, OTHERS),
    "an epsilon times something": (times, True, OTHERS),
    "read by others": (written_out, False, f"{GATES} (1), {ALONE} (1)"),
    "another power": (lambda m, x: m.gain * (x.float() * x.float().pow(3).mean(-1, True).abs().add(1).rsqrt()).half(), True,
                      OTHERS),
    "written afterwards": (changed_after, True, f"{GATES} (1)"),
    "written before": (in_place, True, OTHERS),
}  # fmt: skip


@pytest.mark.parametrize("case", BLOCKS)
def test_patterns(case: str) -> None:
    norm, both, found = BLOCKS[case]
    torch.manual_seed(0)
    model = Block(norm, both).half()
    batch = torch.randn(16, 64).half()
    quantized(model, "rtn", calibration=[batch], targets=["a", "b", "head"])
    with quantkit.use_backend("triton"), torch.no_grad():
        x, other = batch[:3], batch[5:8]
        rehearsal = Rehearsal(model, [x], model)
        fused = rehearsal.fused()
        assert fused is not None
        assert fused.said.partition("fused: ")[2] == found
        assert distance(fused([x]), rehearsal.outputs) < 2e-2
        assert distance(fused([other]), model(other)) < 2e-2


def test_models_that_make_positions_otherwise() -> None:
    """Interleaved, or of a part of the channels: these run as they were called."""
    settings: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 64}
    models = [
        transformers.GPTJForCausalLM(transformers.GPTJConfig(n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=64,
                                                             vocab_size=VOCAB)),
        transformers.CohereForCausalLM(transformers.CohereConfig(
            hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            **settings)),
    ]  # fmt: skip
    for model in models:
        torch.manual_seed(0)
        assert POSITIONS not in fused_of(model.half().eval(), 2, 1e-2)


def test_halves_that_are_none() -> None:
    """``x[..., ::2]`` begins where the left half does."""

    def turned(x: Tensor) -> Tensor:
        return x * x.cos() + torch.cat((-x[..., 4:], x[..., ::2]), -1) * x.sin()

    x = torch.randn(1, 2, 3, 8).half()
    rehearsal = Rehearsal(turned, [x], nn.Identity())
    fused = rehearsal.fused()
    assert fused is not None
    assert POSITIONS not in fused.said
    assert torch.equal(fused([x + 1]), turned(x + 1))


def test_kernels_that_no_operator_launches() -> None:
    """Only the function itself can launch them again."""
    with torch.no_grad():
        x = torch.ones(3)
        assert Rehearsal(lambda x: torch.empty(3).fill_(2) + x, [x], nn.Identity()).fused() is not None
        assert Rehearsal(lambda x: torch.empty_like(x) + x, [x], nn.Identity()).fused() is None  # who wrote it?


def test_layers_with_a_forward_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    quantized(model, "rtn", calibration=[torch.randn(4, 8)], targets=["0"])
    layer: Any = model[0]

    def twice(input: Tensor) -> Any:
        return type(layer).forward(layer, input) * 2

    layer.forward = twice
    x = torch.randn(2, 8)
    with torch.no_grad():
        rehearsal = Rehearsal(lambda x: layer(input=x), [x], model)
        fused = rehearsal.fused()
        assert fused is not None
        assert torch.equal(rehearsal.outputs, layer(x))
        assert torch.equal(fused([x + 1]), layer(x + 1))


def test_attention_under_autocast() -> None:
    def step(q: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 3, 8)
    fused = Rehearsal(step, [q], nn.Identity()).fused()
    assert fused is not None
    assert fused([q]).dtype == torch.bfloat16


def test_results_that_hold_more_than_tensors() -> None:
    class Result:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    layer = nn.Linear(4, 3)
    assert Rehearsal(lambda x: Result(layer(x)), [torch.ones(1, 4)], layer).fused() is None
    assert isinstance(Rehearsal(layer, [torch.ones(1, 4)], layer).fused(), Fused)
