"""Whatever breaks off before the conversion leaves the model as it was, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers import Fixed, mlp, normal, quantized, refused
from torch import Tensor

from quantkit import (
    Plan,
    Stage,
)

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
