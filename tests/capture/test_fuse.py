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
    "rptq": ("rptq", {GATES: 2, ALONE: 1, BOTH: 4}),
    "columns": (LLMInt8(columns=2), {ALONE: 1, BOTH: 4}),
    "threshold": (LLMInt8(threshold=2.0), {ALONE: 1, BOTH: 4}),
}


@pytest.mark.parametrize(
    ("method", "batch"),
    [("float", 3), ("rtn", 1), ("rtn", 3), ("rotation", 1), ("rptq", 3), ("columns", 1), ("threshold", 3)],
)
def test_methods(method: str, batch: int) -> None:
    how, found = METHODS[method]
    torch.manual_seed(1)
    model = llama(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).half()
    if how is not None:
        quantkit.quantize(model, how, heads=method != "rptq", calibration=[tokens(4, 20)], progress=False)
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


BLOCKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool, str]] = {
    "written out": (written_out, True, f"{NORMS} (1), {GATES} (1)"),
    "layer norm": (lambda m, x: F.layer_norm(x, (64,), m.gain, None, 1e-5), True, f"{NORMS} (1), {GATES} (1)"),
    "residual": (lambda m, x: written_out(m, x + x.flip(0)), True, f"{SUMS} (1), {GATES} (1)"),
    "no norm": (lambda m, x: x + 1, True, f"shared codes (1), {GATES} (1)"),
    "read by others": (written_out, False, f"{GATES} (1), {ALONE} (1)"),
    "another power": (lambda m, x: m.gain * (x.float() * x.float().pow(3).mean(-1, True).abs().add(1).rsqrt()).half(), True,
                      f"shared codes (1), {GATES} (1)"),
    "written afterwards": (changed_after, True, f"{GATES} (1)"),
    "written before": (in_place, True, f"shared codes (1), {GATES} (1)"),
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


def test_results_that_hold_more_than_tensors() -> None:
    class Result:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    layer = nn.Linear(4, 3)
    assert Rehearsal(lambda x: Result(layer(x)), [torch.ones(1, 4)], layer).fused() is None
    assert isinstance(Rehearsal(layer, [torch.ones(1, 4)], layer).fused(), Fused)
