"""A conversion that breaks off half way marks the model, which is refused from then on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers import mlp, quantized

from quantkit import (
    ModelError,
    W8A8Linear,
)


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
