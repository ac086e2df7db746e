"""What looks like a linear and is none, and what belongs to a module that is replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import normal, quantized, refused
from torch import nn
from torch.nn.utils import parametrizations

import quantkit
from quantkit import ModelError, TargetError
from quantkit.model.modules import evaluating, linears_of, lookalikes_of, replace_module


class Own(nn.Module):
    """Somebody's linear, which is none of torch's."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.in_features, self.out_features = k, n
        self.matrix = nn.Parameter(torch.randn(k, n))

    def forward(self, x: Any) -> Any:
        return x @ self.matrix


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.inner = 8, 8, nn.Linear(8, 8)


def int8_of_another_library() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


def fp8() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(torch.ones(1))
    return layer


def with_buffer() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_buffer("running", torch.zeros(8))
    return layer


class Subclass(torch.Tensor):
    pass


def of_another_type() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclass))
    return layer


LOOK = {
    "another class": (lambda: Own(8, 8), "Own is no nn.Linear"),
    "parametrized": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "computed from others"),
    "integers": (int8_of_another_library, "int8"),
    "codes with scales": (fp8, "weight_scale_inv"),
    "a buffer": (with_buffer, "running"),
    "another tensor": (of_another_type, "Subclass"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight"),
}


@pytest.mark.parametrize("kind", LOOK)
def test_lookalikes_are_named_with_the_reason(kind: str) -> None:
    build, word = LOOK[kind]
    model = nn.Sequential(build(), nn.Linear(8, 8), Wrapped())
    found = lookalikes_of(model)
    assert word in found.pop("0")
    assert not [name for name in found if not name.startswith("0.")]
    assert linears_of(model).keys() == {"1", "2.inner"}


def test_lookalikes_are_in_the_report_and_may_be_ignored() -> None:
    def build() -> nn.Module:
        return nn.Sequential(Own(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)).eval()

    for ignore in ([], ["0"], [Own]):
        record = quantkit.report(quantized(build(), ignore=ignore))
        assert {layer.name: layer.kind for layer in record.layers} == {"0": "float", "2": "int8", "4": "float"}
        assert "Own" in str(record)
    with refused(model := build(), TargetError, "Own is no nn.Linear"):
        quantized(model, targets=["0"])
    with refused(model := nn.Sequential(Own(16, 8)).eval(), ModelError, "Own is no nn.Linear"):
        quantized(model)


def test_hooks_move_with_their_handles() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    old, new = model[0], nn.Linear(4, 4)
    handles = [
        old.register_forward_pre_hook(lambda m, args: seen.append(("pre", m))),
        old.register_forward_pre_hook(lambda m, args, kwargs: seen.append(("with kwargs", m)), with_kwargs=True, prepend=True),
        old.register_forward_hook(lambda m, args, y: seen.append(("hook", m))),
        old.register_forward_hook(lambda m, args, y: seen.append(("always", m)), always_call=True),
        old.register_full_backward_pre_hook(lambda m, gradient: seen.append(("backward pre", m))),
        old.register_full_backward_hook(lambda m, into, out: seen.append(("backward", m))),
        old.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append(("state", m))),
        old._register_state_dict_hook(lambda m, state, prefix, meta: seen.append(("state dict", m))),
        old.register_load_state_dict_post_hook(lambda m, keys: seen.append(("loaded", m))),
    ]
    replace_module(model, "0", new)
    model(normal(2, 4).requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    order = ["with kwargs", "pre", "hook", "always", "backward pre", "backward", "state", "state dict", "loaded"]
    assert seen == [(what, new) for what in order]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(normal(2, 4).requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    assert not seen


def test_attributes_given_to_a_linear_move() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].gain = 3.0
    new = nn.Linear(4, 5)
    replace_module(model, "0", new)
    assert new.gain == 3.0
    assert new.out_features == 5


def test_no_nested_tensors_while_a_model_is_evaluated() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    never = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1, enable_nested_tensor=False)
    with evaluating(nn.ModuleList([encoder, never])):
        assert not encoder.use_nested_tensor
        assert not encoder.training
    assert encoder.use_nested_tensor
    assert not never.use_nested_tensor
    assert encoder.training
