"""The guard by itself: what it must not touch."""

from __future__ import annotations

import sys
import traceback

import pytest
from helpers import assert_same, mlp, normal, quantized, state
from torch import Tensor, nn

import quantkit
from quantkit import ModelError
from quantkit.model.guard import BROKEN, Guard


class Sizes:
    width = 16


class ByClass(nn.Module):
    """Whose configuration is a class, as in many models for teaching."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Sizes
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def test_a_configuration_that_is_a_class() -> None:
    model = ByClass()
    before = state(model)
    quantkit.discover(model, normal(2, 5, 16))
    assert_same(state(model), before)
    assert quantkit.report(quantized(model, calibration=[normal(2, 5, 16)])).layers


def test_a_broken_model_stays_marked() -> None:
    model = mlp()
    setattr(model, BROKEN, True)
    quantkit.discover(model, normal(2, 5, 16))
    with pytest.raises(ModelError, match="interrupted half way"):
        quantized(model)


def test_what_the_caller_handles_is_left_alone() -> None:
    """Whoever looks at the frames of an interruption of their own may call quantkit meanwhile."""

    def interrupted() -> None:
        local = "of use to a debugger"
        raise KeyboardInterrupt(local)

    try:
        interrupted()
    except KeyboardInterrupt as error:
        quantkit.discover(mlp(), normal(2, 5, 16))
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    assert frames[-1]["local"] == "of use to a debugger"


def test_attributes_hooks_and_their_order() -> None:
    model = mlp()
    kept = model.register_forward_hook(lambda *_: None)
    before, hooks = dict(vars(model)), list(model._forward_hooks.items())
    guard = Guard(model)
    model.extra = 1
    kept.remove()
    model.register_forward_hook(lambda *_: None)
    model.eval()
    guard.give_back()
    assert list(model._forward_hooks.items()) == hooks
    assert vars(model) == before
    assert sys.exc_info() == (None, None, None)
