"""Whatever breaks off before the conversion leaves the model as it was, to the bit."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from helpers import Fixed, assert_same, llama, mlp, normal, quantized, refused, state, tokens
from torch import Tensor, nn

import quantkit
from quantkit import (
    RPTQ,
    CalibrationError,
    Plan,
    Stage,
)
from quantkit.discovery import probe
from quantkit.pipeline import attention, convert

DATA = [normal(2, 5, 16)]


def interrupted(error: BaseException) -> Iterator[Tensor]:
    yield DATA[0]
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), OSError("disk")], ids=repr)
def test_data_that_breaks_off(error: BaseException) -> None:
    model = mlp().train()
    with refused(model, type(error), str(error)):
        quantized(model, calibration=interrupted(error))


def test_a_forward_that_fails() -> None:
    class Picky(type(mlp())):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            if len(x) == 3:
                raise RuntimeError("three is too many")
            return h

    model = Picky().train()
    with refused(model, RuntimeError, "three is too many"):
        quantized(model, calibration=[*DATA, normal(3, 5, 16)])
    with refused(model, RuntimeError, "[2, 5, 7]"):
        quantized(model, calibration=[*DATA, normal(2, 5, 7)])


def test_a_calibrator_that_fails() -> None:
    class Broken(Fixed):
        def plan(self, view: Any) -> Plan:
            raise ZeroDivisionError("no plan")

    model = mlp()
    with refused(model, ZeroDivisionError, "no plan"):
        quantized(model, ["smoothquant", Broken(Stage.PARTITION)])


# ---- attention, which is decided on the converted model


ATTENTION = ["w8a8-kv8", "w8a8-static-kv8-attention8", "w4a16-static-kv4", "w8a8-static-asym-norm4-kv4-attention4"]


class BreaksOff:
    """Batches, of which the last walk of so many ends with an error."""

    def __init__(self, walks: int) -> None:
        self.walks = walks

    def __iter__(self) -> Iterator[Tensor]:
        yield tokens()
        self.walks -= 1  # whoever looks at the first batch alone does not count
        if self.walks == 0:
            raise OSError("disk")
        yield tokens(seed=1)


@pytest.mark.parametrize("call", [quantkit.quantize, quantkit.plan], ids=["quantize", "plan"])
@pytest.mark.parametrize("method", ["rtn", "smoothquant", ["rotate", "rtn"], RPTQ(4)], ids=str)
def test_data_that_breaks_off_on_any_walk(call: Any, method: Any) -> None:
    """The last walk is that of attention, for which the model is converted for a while."""
    model, options = llama().train(), {"scheme": "w8a8-static-kv4", "progress": False}
    counted = BreaksOff(0)
    quantkit.plan(model, method, calibration=counted, **options)
    assert counted.walks <= -2
    for walks in range(1, 1 - counted.walks):
        with refused(model, OSError, "disk"):
            call(model, method, calibration=BreaksOff(walks), **options)


@pytest.mark.parametrize("call", [quantkit.quantize, quantkit.plan], ids=["quantize", "plan"])
@pytest.mark.parametrize("scheme", ATTENTION)
def test_values_of_attention_that_are_not_finite(call: Any, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found while the model is converted for the time of one pass."""
    model, real = llama().train(), attention.calibrate_attention

    def late(model: nn.Module, *args: Any, **options: Any) -> Any:
        """The values of the last layer are not finite any more."""
        layers = [m for name, m in model.named_modules() if name.endswith("v_proj")]
        handle = layers[-1].register_forward_hook(lambda module, args, out: out * math.inf)
        try:
            return real(model, *args, **options)
        finally:
            handle.remove()

    monkeypatch.setattr(attention, "calibrate_attention", late)
    if "static" in scheme:
        with refused(model, CalibrationError, "NaN"):
            call(model, "smoothquant", scheme=scheme, calibration=[tokens(), tokens(seed=1)], progress=False)
    monkeypatch.undo()
    quantkit.quantize(model, "smoothquant", scheme=scheme, calibration=[tokens()], progress=False)  # it still can


@pytest.mark.parametrize("call", [quantkit.quantize, quantkit.plan], ids=["quantize", "plan"])
def test_a_generator_where_attention_reads_the_data_again(call: Any) -> None:
    model = llama()
    with refused(model, CalibrationError, "attention", "not a generator"):
        call(model, ["rotate", "rtn"], scheme="w8a8-static-kv8", calibration=iter([tokens()]), progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("method", ["smoothquant", ["rotate", "rtn"], RPTQ(4)], ids=str)
def test_the_conversion_for_attention_is_undone_half_way(
    error: BaseException, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third linear cannot be replaced: the two before it are put back."""
    model, real, calls = llama().train(), convert.replace_module, []

    def once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise error
        real(*args)

    monkeypatch.setattr(convert, "replace_module", once)
    with refused(model, type(error)):
        quantkit.plan(model, method, scheme="w8a8-static-kv8", calibration=[tokens()], progress=False)
    assert len(calls) == 3 + 3  # the third, which may have been half way, as well


def test_what_waits_to_clean_up_does_so_before_the_model_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption just after a context manager was entered: it is left only when the traceback goes, and too late."""
    model = llama().train()
    before = state(model)

    @contextmanager
    def entered(model: Any) -> Iterator[None]:
        flags = {module: module.training for module in model.modules()}
        model.eval()
        try:
            yield
        finally:
            for module in flags:
                module.training = False  # as it was found inside of another one

    class Entering:
        def __enter__(self) -> None:
            self.inner = entered(model)
            self.inner.__enter__()
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None:
            raise AssertionError("never entered")

    monkeypatch.setattr(probe, "evaluating", lambda model: Entering())
    with suppress(KeyboardInterrupt):
        quantkit.quantize(model, calibration=[tokens()], progress=False)
    gc.collect()
    assert_same(state(model), before)
    assert all(module.training for module in model.modules())
