"""Subclasses of ``nn.Linear`` with a forward of their own: which of them are linears, for every input and every weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, normal, quantized
from torch import Tensor, nn
from torch.nn import functional as F

import quantkit
from quantkit.model.modules import is_linear, lookalikes_of


class Plain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Clamps(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.clamp(-500, 500), self.weight, self.bias)


class ForgetsTheSmall(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.threshold(x, 1e-2, 0.0) - F.threshold(-x, 1e-2, 0.0), self.weight, self.bias)


class Saturates(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).clamp(-1e4, 1e4)


class Signs(nn.Linear):
    """A binary weight, which is its own sign times one size from the start."""

    def __init__(self, n: int, k: int, bias: bool = True) -> None:
        super().__init__(n, k, bias)
        nn.init.constant_(self.weight, 0.1).data[::2] *= -1

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class OnAGrid(nn.Linear):
    """Rounds its weight to 8 bits, to which it is rounded already."""

    def __init__(self, n: int, k: int, bias: bool = True) -> None:
        super().__init__(n, k, bias)
        self.weight.data = self.rounded()

    def rounded(self) -> Tensor:
        step = self.weight.detach().abs().max() / 127
        return (self.weight / step).round() * step

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded(), self.bias)


class RoundsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return F.linear((x / step).round() * step, self.weight, self.bias)


class Adapted(nn.Linear):
    """An adapter that is zero until it is trained."""

    def __init__(self, n: int, k: int, bias: bool = True) -> None:
        super().__init__(n, k, bias)
        self.down, self.up = nn.Parameter(torch.randn(2, n)), nn.Parameter(torch.zeros(k, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.down.T @ self.up.T


class Scaled(nn.Linear):
    def __init__(self, n: int, k: int, bias: bool = True) -> None:
        super().__init__(n, k, bias)
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.factor, self.bias)


class Remembers(nn.Linear):
    """Made something of its weight once."""

    def __init__(self, n: int, k: int, bias: bool = True) -> None:
        super().__init__(n, k, bias)
        self.transposed = self.weight.detach().clone().T

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.transposed
        return y if self.bias is None else y + self.bias


class Unbiased(nn.Linear):
    """Leaves its bias, which is zero, out."""

    def __init__(self, n: int, k: int, bias: bool = True) -> None:
        super().__init__(n, k, bias)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class TwoArguments(nn.Linear):
    def forward(self, x: Tensor, task: Any = None, *, factor: float = 1.0) -> Tensor:
        return F.linear(x, self.weight, self.bias) * factor


class MustHave(nn.Linear):
    def forward(self, x: Tensor, *, factor: float) -> Tensor:
        return F.linear(x, self.weight, self.bias) * factor


class Anything(nn.Linear):
    def forward(self, *args: Any) -> Tensor:
        return F.linear(args[0], self.weight, self.bias)


class Raises(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 9:
            raise KeyError("nine or nothing")
        return F.linear(x, self.weight, self.bias)


class ReturnsTwo(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight), self.bias


class OtherType(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).double()


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Any:
        return 2 * super().__call__(x)


NONE_OF_THEM = [
    Called,
    Clamps, ForgetsTheSmall, Saturates, Signs, OnAGrid, RoundsInput, Adapted, Scaled, Remembers, Unbiased, TwoArguments,
    MustHave, Anything, Raises, ReturnsTwo, OtherType,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_of_its_own_that_multiplies_is_a_linear(bias: bool, dtype: torch.dtype) -> None:
    layer = Plain(64, 48, bias=bias).to(dtype)
    assert is_linear(layer)
    layer.weight.data.zero_()
    assert is_linear(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NONE_OF_THEM)
def test_what_is_a_linear_for_some_inputs_or_weights_only_is_none(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = kind(64, 64).to(dtype)
    reason = lookalikes_of(nn.Sequential(layer))["0"]
    assert kind.__name__ in reason
    assert not is_linear(layer)


@pytest.mark.parametrize("kind", [Plain, *NONE_OF_THEM])
def test_a_trial_leaves_no_trace(kind: Any) -> None:
    layer = kind(16, 16).train()
    parameters, before = dict(layer.named_parameters()), {k: v.clone() for k, v in layer.state_dict().items()}
    versions, random = [p._version for p in layer.parameters()], torch.get_rng_state()
    is_linear(layer)
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert list(parameters) == list(layer._parameters)
    assert [p._version for p in layer.parameters()] == versions
    assert layer.training
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(dict(layer.state_dict()), before)


@pytest.mark.parametrize("kind", [k for k in NONE_OF_THEM if k not in (ReturnsTwo, OtherType, Raises, MustHave)])
def test_subclasses_that_are_no_linears_stay_in_float_and_are_named(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), kind(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    x = normal(64, 16) * 3
    wanted = model(x).detach()
    quantized(model, calibration=[x])
    reasons = {layer.name: layer.reason for layer in quantkit.report(model).layers if layer.kind == "float"}
    assert kind.__name__ in reasons["1"]
    assert reasons.keys() == {"1", "5"}
    assert (model(x) - wanted).norm() < 0.03 * wanted.norm()
