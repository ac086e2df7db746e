"""A conversion that breaks off half way gives the float model back, or says that it cannot be had any more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers import assert_same, mlp, normal, quantized, state

import quantkit
from quantkit import ModelError, W8A8Linear
from quantkit.model import guard
from quantkit.pipeline import convert

CALLS = {
    "quantize": quantized,
    "quantize, unverified": lambda model: quantized(model, verify=False),
    "convert": lambda model: quantkit.convert(model, quantkit.plan(mlp(), calibration=[normal(2, 5, 16)], progress=False)),
}


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
    """Let the second call of a function raise."""
    real, calls = getattr(owner, name), []

    def once(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(owner, name, once)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize(("owner", "name"), [(W8A8Linear, "from_float"), (convert, "replace_module")], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_float_model_is_given_back(
    call: str, owner: Any, name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    before = state(model)
    with monkeypatch.context() as patch:
        failing(patch, owner, name, error)
        with pytest.raises(type(error)):
            CALLS[call](model)
    assert_same(state(model), before)
    quantized(model)


@pytest.mark.parametrize("call", CALLS)
def test_a_model_too_large_for_that_is_marked(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are its copies."""
    model, plan = mlp(), quantkit.plan(mlp(), calibration=[normal(2, 5, 16)], progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(guard, "KEPT_BYTES", 0)
        failing(patch, convert, "replace_module", MemoryError())
        with pytest.raises(MemoryError):
            CALLS[call](model)
    for broken in (model, copy.deepcopy(model)):
        with pytest.raises(ModelError, match="interrupted half way"):
            quantized(broken)
        with pytest.raises(ModelError, match="interrupted half way"):
            quantkit.plan(broken, calibration=[normal(2, 5, 16)], progress=False)
        with pytest.raises(ModelError, match="interrupted half way"):
            quantkit.convert(broken, plan, progress=False)
