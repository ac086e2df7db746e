"""What cannot work is refused by name, before anything changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Fixed, FixedRotate, mlp, normal, quantized, refused
from torch import Tensor, nn

import quantkit
from quantkit import (
    RTN,
    CalibrationError,
    MethodError,
    ModelError,
    Range,
    SchemeError,
    SmoothQuant,
    Stage,
    TargetError,
    Transform,
)
from quantkit.core.numerics import MAX_EXACT_K

DATA = [normal(2, 5, 16)]


class Choose(Fixed):
    name = "choose"


def nothing() -> Iterator[Tensor]:
    yield from ()


CALLS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "unknown method": ({"method": "awq"}, MethodError, ["'awq'", "rtn", "smoothquant"]),
    "class": ({"method": SmoothQuant}, MethodError, ["did you mean SmoothQuant()?"]),
    "class in a list": ({"method": [SmoothQuant(), RTN]}, MethodError, ["did you mean RTN()?"]),
    "no method": ({"method": []}, MethodError, ["empty", "rtn"]),
    "no calibrator": ({"method": 3}, MethodError, ["3", "plan(view)"]),
    "wrong order": ({"method": ["rtn", "smoothquant"]}, MethodError, ["rtn, smoothquant", "put smoothquant before rtn"]),
    "after a rotation": ({"method": [FixedRotate(Stage.ROTATE), SmoothQuant()]}, MethodError, ["smoothquant before rotate"]),
    "chosen after a rotation": (
        {"method": [FixedRotate(Stage.ROTATE), Choose(Stage.PARTITION)]}, MethodError, ["choose before"]
    ),
    "scaled after a choice": ({"method": [Choose(Stage.PARTITION), "smoothquant"]}, MethodError, ["before choose"]),
    "twice": ({"method": [SmoothQuant(), SmoothQuant(0.5)]}, MethodError, ["smoothquant twice"]),
    "two that round": ({"method": [Fixed(Stage.ROUND), RTN()]}, MethodError, ["fixed and rtn"]),
    "rounding to nothing": ({"method": ["smoothquant", "rtn"], "scheme": None}, MethodError, ["scheme=None", "drop rtn"]),
    "unknown site": ({"method": Fixed(transforms={"upp": Transform()})}, MethodError, ["fixed", "upp"]),
    "tensor": ({"calibration": DATA[0]}, CalibrationError, ["Tensor", "list"]),
    "string": ({"calibration": "abc"}, CalibrationError, ["str"]),
    "dict": ({"calibration": {"x": DATA[0]}}, CalibrationError, ["dict"]),
    "number": ({"calibration": 3}, CalibrationError, ["int"]),
    "batch of numbers": ({"calibration": [3]}, CalibrationError, ["int", "tuples of arguments"]),
    "later batch of numbers": ({"calibration": [*DATA, 3]}, CalibrationError, ["int", "tuples of arguments"]),
    "no tensor": ({"calibration": [{"x": 3}]}, CalibrationError, ["no tensor"]),
    "no elements": ({"calibration": [torch.zeros(0, 16)]}, CalibrationError, ["empty"]),
    "empty": ({"calibration": []}, CalibrationError, ["empty"]),
    "empty generator": ({"calibration": nothing()}, CalibrationError, ["empty"]),
    "missing": ({"calibration": None}, CalibrationError, ["missing", "MLP", "calibration=[...]"]),
    "no tokenizer": ({"calibration": ["some text"]}, CalibrationError, ["tokenizer="]),
    "device": ({"calibration": [DATA[0].to("meta")]}, CalibrationError, ["meta", "cpu"]),
    "nan": ({"calibration": [*DATA, DATA[0] * math.nan]}, CalibrationError, ["batch 2", "NaN or Inf", "'up'"]),
    "inf": ({"calibration": [*DATA, DATA[0] / 0]}, CalibrationError, ["batch 2", "NaN or Inf", "'up'"]),
    "nan at first": ({"calibration": [DATA[0] * math.nan]}, CalibrationError, ["batch 1", "NaN or Inf", "'up'"]),
    "ignored nothing": ({"ignore": ["upp"]}, TargetError, ["ignore=['upp']", "close to it: up"]),
    "targeted nothing": ({"targets": ["*.mlp.*"]}, TargetError, ["targets=['*.mlp.*']", "none of the 2"]),
    "ignored class": ({"ignore": [nn.Conv2d]}, TargetError, ["Conv2d"]),
    "one name": ({"ignore": "up"}, TargetError, ["ignore=['up']"]),
    "one target": ({"targets": "up"}, TargetError, ["targets=['up']"]),
    "number as a name": ({"ignore": [3]}, TargetError, ["3", "globs"]),
    "everything ignored": ({"ignore": [nn.Linear]}, ModelError, ["no linear is left", "ignored"]),
    "unknown scheme": ({"scheme": "int8"}, SchemeError, ["'int8'", "w8a8-static"]),
    "scheme of 9 bits": ({"scheme": "w9a8"}, SchemeError, ["'w9a8'", "bits=9", "2 to 8"]),
    "scheme of another type": ({"scheme": 8}, SchemeError, ["8"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_refused(case: str) -> None:
    options, error, words = CALLS[case]
    model = mlp(outliers=True).train()
    with refused(model, error, *words):
        quantized(model, **options)
    assert issubclass(error, quantkit.QuantkitError)
    quantized(model, ignore=["down"])  # and it can still be quantized


def test_models_without_linears() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Conv1d(5, 5, 1))
    with refused(model, ModelError, "Sequential", "no linear"):
        quantized(model)


@pytest.mark.parametrize("thing", [None, "path/to/model", 3, nn.Linear])
def test_no_models(thing: Any) -> None:
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        quantized(thing)


def test_weights_that_are_not_here() -> None:
    model = mlp()
    model.down.to("meta")
    with refused(model, ModelError, "'down.weight'", "meta"):
        quantized(model)


def test_twice() -> None:
    model = quantized(mlp())
    with refused(model, ModelError, "quantized already"):
        quantized(model)


def test_too_wide() -> None:
    model = mlp(width=MAX_EXACT_K + 1, inner=1)
    with refused(model, ModelError, "'up'", str(MAX_EXACT_K + 1), str(MAX_EXACT_K), "ignore=['up']"):
        quantized(model, "rtn", calibration=[normal(2, MAX_EXACT_K + 1)])


# ---- interruptions


class Narrow(Range):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)


ATTRIBUTES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no name": ({"name": None}, ["Fixed", "name"]),
    "stage as a word": ({"stage": "scale"}, ["fixed", "'scale'", "Stage.SCALE"]),
    "stage as a number": ({"stage": 1}, ["fixed", "Stage.SCALE"]),
    "no tuple": ({"statistics": Range}, ["fixed", "Range", "tuple"]),
    "none": ({"statistics": None}, ["fixed", "None", "tuple"]),
    "an instance": ({"statistics": (Range(3),)}, ["fixed", "Range", "class"]),
    "a word": ({"statistics": ("Range",)}, ["fixed", "'Range'", "class"]),
    "no statistic": ({"statistics": (dict,)}, ["fixed", "dict", "update, merge, after"]),
    "built otherwise": ({"statistics": (Narrow,)}, ["fixed", "Narrow", "(channels, device, seed)"]),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
def test_attributes_of_another_type(case: str) -> None:
    attributes, words = ATTRIBUTES[case]
    model, method = mlp(), Fixed()
    vars(method).update(attributes)
    with refused(model, MethodError, *words):
        quantized(model, method)
