"""A conversion that breaks off half way marks the model, which is refused from then on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers import mlp, normal, quantized

import quantkit
from quantkit import (
    ModelError,
    W8A8Linear,
)
from quantkit.pipeline import convert


def test_a_conversion_that_is_interrupted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, calls = mlp(), W8A8Linear.from_float, []

    def once(*args: Any, **options: Any) -> W8A8Linear:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(W8A8Linear, "from_float", once)
    with pytest.raises(KeyboardInterrupt):
        quantized(model)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="interrupted half way"):
        quantized(model)
    with pytest.raises(ModelError, match="interrupted half way"):
        quantized(copy.deepcopy(model))


@pytest.mark.parametrize("call", ["quantize", "convert"])
def test_a_linear_that_cannot_be_replaced(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing raises half way by itself; if something does, the model is marked, and so are its copies."""
    model, real, calls = mlp(), convert.replace_module, []
    plan = quantkit.plan(model, calibration=[normal(2, 5, 16)], progress=False)

    def once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(convert, "replace_module", once)
    with pytest.raises(MemoryError):
        quantized(model) if call == "quantize" else quantkit.convert(model, plan, progress=False)
    monkeypatch.undo()
    for broken in (model, copy.deepcopy(model)):
        with pytest.raises(ModelError, match="interrupted half way"):
            quantized(broken)
        with pytest.raises(ModelError, match="interrupted half way"):
            quantkit.plan(broken, calibration=[normal(2, 5, 16)], progress=False)
        with pytest.raises(ModelError, match="interrupted half way"):
            quantkit.convert(broken, plan, progress=False)
