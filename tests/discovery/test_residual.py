"""The residual stream rotates only if nothing but linears and embeddings reads or writes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCAB, WIDTH, NanoGPT, tokens
from helpers import assert_same, llama, refused, state
from nets import Gated
from randomised import randomise, rotated
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import quantkit
from quantkit import MethodError
from quantkit.discovery.equivalence import outputs_of, relative_error


def test_stream_behind_a_gate_still_turns() -> None:
    model = Gated()
    randomise(model, False)
    wanted = outputs_of(model, tokens())
    report = quantkit.report(rotated(model, tokens()))
    assert relative_error(wanted, outputs_of(model, tokens())) < 1e-5
    assert any("residual stream of 32" in line for line in report.rewrites)
    assert not any("heads" in line for line in report.rewrites)


class Reads(NanoGPT):
    """A stream that is read, or written, besides the linears."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.scale = how, nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.lm_head = nn.Linear(WIDTH, VOCAB)

    def forward(self, idx: Tensor) -> Any:  # type: ignore[override]
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        if self.how == "a parameter writes":
            x = x + self.scale
        for block in self.h:
            x = block(x)
            x = x * self.scale if self.how == "a gain on the stream" else x.clamp(-1, 1) if self.how == "clamped" else x
        logits = self.lm_head(self.ln_f(x))
        return (logits, x) if self.how == "an output" else logits


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a parameter writes", "does not rotate with the stream"),
        ("a gain on the stream", "does not rotate with the stream|no linear adds"),
        ("clamped", "does not rotate with the stream"),
        ("an output", "an output of the model reads the stream"),
    ],
)
def test_stream_read_or_written_from_outside(how: str, reason: str) -> None:
    model = Reads(how)
    randomise(model, False)
    before = state(model)
    with pytest.raises(MethodError, match=reason):
        rotated(model, tokens())
    assert_same(state(model), before)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


COMPUTED = {
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.3),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_nothing_is_written_to_an_embedding_whose_weight_is_computed(kind: str) -> None:
    model = llama()
    COMPUTED[kind](model.model.embed_tokens)
    with refused(model, MethodError, "holds its own weight"):
        quantkit.quantize(model, "rotate", scheme=None)


def test_hooks_on_an_embedding_are_behind_its_rotation() -> None:
    model = NanoGPT()
    randomise(model, False)
    model.wte.register_forward_hook(lambda m, args, y: 3 * y)
    wanted = outputs_of(model, tokens())
    rotated(model, tokens())
    assert relative_error(wanted, outputs_of(model, tokens())) < 1e-5
    model = NanoGPT()
    model.wte.register_forward_hook(lambda m, args, y: y * torch.linspace(1, 2, y.shape[-1]))
    with refused(model, MethodError, "does not rotate"):
        rotated(model, tokens())
