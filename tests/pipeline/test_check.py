"""What cannot work is refused by name, before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import MLP, Fixed, FixedRotate, int8, llama, mlp, normal, quantized, refused
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
PAIRS = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(normal(8, 16), torch.zeros(8)), batch_size=4)


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
    "numbers of another dtype": ({"calibration": [DATA[0].double()]}, CalibrationError, ["MLP does not run", "RuntimeError"]),
    "features of another size": ({"calibration": [normal(2, 5, 7)]}, CalibrationError, ["MLP does not run", "[2, 5, 7]"]),
    "targets beside inputs": ({"calibration": [(DATA[0], DATA[0])]}, CalibrationError, ["2 arguments", "takes (x)"]),
    "targets later": ({"calibration": [*DATA, (DATA[0], DATA[0])]}, CalibrationError, ["2 arguments", "takes (x)"]),
    "loader of pairs": ({"calibration": PAIRS}, CalibrationError, ["2 arguments", "without labels", "[x for x, y in loader]"]),
    "labels by name": ({"calibration": [{"x": DATA[0], "labels": DATA[0]}]}, CalibrationError, ["dict of x, labels", "(x)"]),
    "another name": ({"calibration": [{"y": DATA[0]}]}, CalibrationError, ["dict of y", "MLP.forward takes (x)"]),
    "arrays": ({"calibration": [DATA[0].numpy()]}, CalibrationError, ["ndarray", "tensors"]),
    "an array": ({"calibration": DATA[0].numpy()}, CalibrationError, ["ndarray", "tensors"]),
    "tuple of arrays": ({"calibration": [(DATA[0].numpy(),)]}, CalibrationError, ["no tensor"]),
    "sparse": ({"calibration": [normal(5, 16).to_sparse()]}, CalibrationError, ["MLP does not run"]),
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


# ---- weights of others


def with_weight(change: Callable[[Tensor], Tensor]) -> Any:
    model = mlp()
    model.up.weight = nn.Parameter(change(model.up.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    """Also where no data would show it."""
    for method in ("rtn", "smoothquant"):
        model = with_weight(lambda weight: weight.index_fill(0, torch.tensor(3), value))
        with refused(model, ModelError, "'up'", "NaN or Inf", "ignore=['up']"):
            quantized(model, method)
    model = llama()
    model.lm_head.weight.data[3] = value
    with refused(model, ModelError, "'lm_head'"):
        quantized(model, "rtn", calibration=None)
    model = llama()
    model.model.embed_tokens.weight.data[:] = value
    with refused(model, CalibrationError, "sample", "NaN or Inf"):
        quantized(model, "rtn", calibration=None)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_were_quantized_before(dtype: torch.dtype) -> None:
    for options in ({}, {"ignore": ["up"]}):
        with pytest.raises(ModelError, match=f"layer 'up' has a weight of {dtype}.*bfloat16"):
            quantized(with_weight(lambda weight: weight.to(dtype)), **options)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    "change", [lambda w: w.to(torch.complex64), Tensor.to_sparse, Tensor.to_sparse_csr], ids=["complex", "coo", "csr"]
)
def test_weights_of_another_kind(change: Callable[[Tensor], Tensor]) -> None:
    """Where the model runs with them they stay, and where it does not it is refused."""

    class Kind(MLP):
        def forward(self, x: Tensor) -> Tensor:
            up = self.up.weight.to_dense() if self.up.weight.layout != torch.strided else self.up.weight.real
            return x + self.down(nn.functional.linear(self.norm(x), up, self.up.bias).relu())

    model = with_weight(change)
    if model.up.weight.is_complex():
        with pytest.raises(CalibrationError, match="MLP does not run on the first calibration batch"):
            quantized(model)
    model.__class__ = Kind
    weight, wanted = model.up.weight, model(DATA[0])
    quantized(model, targets=["down"])
    assert int8(model) == {"down"}
    assert model.up.weight is weight
    assert (model(DATA[0]) - wanted).norm() < 0.02 * wanted.norm()


def test_inference_tensors() -> None:
    with torch.inference_mode():
        model, data = mlp(), [DATA[0].clone()]
        quantized(model, calibration=data)
    assert int8(model) == {"up", "down"}
    with torch.no_grad():
        assert model(DATA[0]).isfinite().all()


class Indexing(MLP):
    """Its linear ``place`` gives an index, which is in its range for real inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.pick, self.place, self.table = nn.Linear(16, 8), nn.Linear(8, 1, bias=False), nn.Embedding(8, 16)
        self.place.weight.data[0] = torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        index = self.place(self.pick(x).softmax(-1))[..., 0].long()
        y: Tensor = super().forward(x + self.table(index))
        return y


def test_a_linear_that_cannot_be_made_up() -> None:
    model = Indexing().eval()
    with refused(model, ModelError, "made-up", "IndexError", "'place'", "ignore=['place']"):
        quantized(model)
    quantized(model, ignore=["place"])
    kinds = {layer.name: (layer.kind, layer.folded_into) for layer in quantkit.report(model).layers}
    assert kinds == {
        "up": ("int8", "norm"), "down": ("int8", "up"), "pick": ("int8", None), "place": ("float", None)
    }  # fmt: skip


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
