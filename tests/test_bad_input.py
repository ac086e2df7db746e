"""What cannot work is refused by name, before anything changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import assert_same, llama, mlp, normal, state, tokens
from torch import Tensor, nn

import quantkit
from quantkit import (
    RTN,
    CalibrationError,
    Codes,
    MethodError,
    ModelError,
    Plan,
    Range,
    Rotation,
    Scheme,
    SchemeError,
    SmoothQuant,
    Stage,
    TargetError,
    Transform,
    W8A8Linear,
)
from quantkit.core.numerics import MAX_EXACT_K

DATA = [normal(2, 5, 16)]


@contextmanager
def refused(model: nn.Module, error: type[BaseException], *words: str) -> Iterator[None]:
    """The call inside raises exactly ``error``, its message holds all ``words``, and the model is as it was."""
    before = state(model)
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_same(state(model), before)


def quantize(model: Any, method: Any = "smoothquant", **options: Any) -> Any:
    return quantkit.quantize(model, method, progress=False, **{"calibration": DATA, **options})


class Fixed:
    """A calibrator that says what it is told."""

    name, statistics = "fixed", (Range,)

    def __init__(self, stage: Stage = Stage.SCALE, **plan: Any) -> None:
        self.stage, self.answer = stage, Plan(**plan)

    def plan(self, view: Any) -> Plan:
        return self.answer


class Rotate(Fixed):
    name = "rotate"


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
    "after a rotation": ({"method": [Rotate(Stage.ROTATE), SmoothQuant()]}, MethodError, ["smoothquant before rotate"]),
    "chosen after a rotation": ({"method": [Rotate(Stage.ROTATE), Choose(Stage.PARTITION)]}, MethodError, ["choose before"]),
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
        quantize(model, **options)
    assert issubclass(error, quantkit.QuantkitError)
    quantize(model, ignore=["down"])  # and it can still be quantized


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, "8", True, None])
def test_bits(bits: Any) -> None:
    for name in ("weight_bits", "activation_bits", "kv_bits", "attention_bits", *(["norm_bits"] if bits is not None else [])):
        with pytest.raises(SchemeError, match=name):
            Scheme(**{name: bits})


@pytest.mark.parametrize(
    "name",
    ["w16a8", "w8a9", "w8a12", "w4a16-kv16", "w4a16-kv", "w4a16-kv4-norm8", "w8a8-attention16", "w4a16-asym", "a8"],
)
def test_names_of_schemes(name: str) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(name)


@pytest.mark.parametrize("options", [{"weights": "row"}, {"activations": "channel"}, {"weights": None}])
def test_granularities(options: dict[str, Any]) -> None:
    with pytest.raises(SchemeError, match=next(iter(options))):
        Scheme(**options)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "0.5", True, None])
def test_alpha(alpha: Any) -> None:
    with pytest.raises(MethodError, match="alpha"):
        SmoothQuant(alpha=alpha)


def test_models_without_linears() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Conv1d(5, 5, 1))
    with refused(model, ModelError, "Sequential", "no linear"):
        quantize(model)


@pytest.mark.parametrize("thing", [None, "path/to/model", 3, nn.Linear])
def test_no_models(thing: Any) -> None:
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        quantize(thing)


def test_models_of_heads_only() -> None:
    model = nn.Sequential(nn.Linear(16, 4)).eval()
    with refused(model, ModelError, "no linear is left", "output head"):
        quantize(model)


def test_weights_that_are_not_here() -> None:
    model = mlp()
    model.down.to("meta")
    with refused(model, ModelError, "'down.weight'", "meta"):
        quantize(model)


def test_twice() -> None:
    model = quantize(mlp())
    with refused(model, ModelError, "quantized already"):
        quantize(model)


def test_too_wide() -> None:
    model = mlp(width=MAX_EXACT_K + 1, inner=1)
    with refused(model, ModelError, "'up'", str(MAX_EXACT_K + 1), str(MAX_EXACT_K), "ignore=['up']"):
        quantize(model, "rtn", calibration=[normal(2, MAX_EXACT_K + 1)])


def test_strings_that_say_nothing() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3] * len(text)}

    for texts, words in ((["", "a"], ["fewer than two tokens"]), (["abc", 3], ["mixes strings", "int"])):
        model = llama()
        with refused(model, CalibrationError, *words):
            quantize(model, calibration=texts, tokenizer=tokenizer)


# ---- interruptions


def interrupted(error: BaseException) -> Iterator[Tensor]:
    yield DATA[0]
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), OSError("disk")], ids=repr)
def test_data_that_breaks_off(error: BaseException) -> None:
    model = mlp().train()
    with refused(model, type(error), str(error)):
        quantize(model, calibration=interrupted(error))


def test_a_forward_that_fails() -> None:
    class Picky(type(mlp())):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            if len(x) == 3:
                raise RuntimeError("three is too many")
            return h

    model = Picky().train()
    with refused(model, RuntimeError, "three is too many"):
        quantize(model, calibration=[*DATA, normal(3, 5, 16)])
    with refused(model, RuntimeError, "[2, 5, 7]"):
        quantize(model, calibration=[*DATA, normal(2, 5, 7)])


def test_a_calibrator_that_fails() -> None:
    class Broken(Fixed):
        def plan(self, view: Any) -> Plan:
            raise ZeroDivisionError("no plan")

    model = mlp()
    with refused(model, ZeroDivisionError, "no plan"):
        quantize(model, ["smoothquant", Broken(Stage.PARTITION)])


def test_a_proof_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tolerance can be met: the norm, written already, gets its parameters back."""
    monkeypatch.setattr("quantkit.pipeline.prove.tolerance_for", lambda *_: -1.0)
    model = mlp()
    with refused(model, quantkit.EquivalenceError, "undone"):
        quantize(model)


def test_a_conversion_that_is_interrupted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, calls = mlp(), W8A8Linear.from_float, []

    def once(*args: Any, **options: Any) -> W8A8Linear:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(W8A8Linear, "from_float", once)
    with pytest.raises(KeyboardInterrupt):
        quantize(model)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="interrupted half way"):
        quantize(model)
    with pytest.raises(ModelError, match="interrupted half way"):
        quantize(copy.deepcopy(model))


CODES = {
    "wrong shape": Codes(torch.zeros(1, 16, dtype=torch.int8), torch.ones(24, 1)),
    "wrong type": Codes(torch.zeros(24, 16), torch.ones(24, 1)),
    "wrong scale": Codes(torch.zeros(24, 16, dtype=torch.int8), torch.ones(1, 1)),
    "-128": Codes(torch.full((24, 16), -128, dtype=torch.int8), torch.ones(24, 1)),
    "list": Codes([[0] * 16] * 24, torch.ones(24, 1)),  # type: ignore[arg-type]
    "no scale": Codes(torch.zeros(24, 16, dtype=torch.int8), None),  # type: ignore[arg-type]
    "nan": Codes(torch.zeros(24, 16, dtype=torch.int8), torch.full((24, 1), math.nan)),
    "negative": Codes(torch.zeros(24, 16, dtype=torch.int8), -torch.ones(24, 1)),
    "whole": Codes(torch.zeros(24, 16, dtype=torch.int8), torch.ones(24, 1, dtype=torch.int32)),
    "elsewhere": Codes(torch.zeros(24, 16, dtype=torch.int8), torch.ones(24, 1, device="meta")),
    "gradient": Codes(torch.zeros(24, 16, dtype=torch.int8), torch.ones(24, 1, requires_grad=True)),
}


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_codes_that_cannot_be(codes: Codes) -> None:
    model = mlp()
    with refused(model, MethodError, "fixed", "'up'"):
        quantize(model, Fixed(Stage.ROUND, codes={"up": codes}))


TRANSFORMS: dict[str, Any] = {
    "short scale": Transform(scale=torch.ones(7)),
    "scale of zeros": Transform(scale=torch.zeros(16)),
    "nan scale": Transform(scale=torch.full((16,), math.nan)),
    "rotation too large": Transform(rotation=Rotation(32)),
    "whole scale": Transform(scale=torch.ones(16, dtype=torch.int64)),
    "bool shift": Transform(shift=torch.ones(16, dtype=torch.bool)),
    "float permutation": Transform(permutation=torch.arange(16.0)),
    "permutation of zeros": Transform(permutation=torch.zeros(16, dtype=torch.int64)),
    "outlier beyond": Transform(outliers=torch.tensor([3, 16])),
    "outlier before": Transform(outliers=torch.tensor([-1])),
    "outlier twice": Transform(outliers=torch.tensor([3, 3])),
    "outliers in two dimensions": Transform(outliers=torch.tensor([[3]])),
    "outliers as a mask": Transform(outliers=torch.ones(16, dtype=torch.bool)),
    "outliers elsewhere": Transform(outliers=torch.tensor([3], device="meta")),
    "outliers in a list": Transform(outliers=[3]),  # type: ignore[arg-type]
    "scale as a number": Transform(scale=2.0),  # type: ignore[arg-type]
    "double scale": Transform(scale=torch.ones(16).double()),
    "scale elsewhere": Transform(scale=torch.ones(16, device="meta")),
    "scale with a gradient": Transform(scale=torch.ones(16, requires_grad=True)),
    "scale without an inverse": Transform(scale=torch.full((16,), 1e-45)),
    "inf shift": Transform(shift=torch.full((16,), math.inf)),
    "permutation in a list": Transform(permutation=list(range(16))),  # type: ignore[arg-type]
    "int32 permutation": Transform(permutation=torch.arange(16, dtype=torch.int32)),
    "rotation as a number": Transform(rotation=16),  # type: ignore[arg-type]
    "signs of two": Transform(rotation=Rotation(16, torch.full((16,), 2.0))),
    "short signs": Transform(rotation=Rotation(16, torch.ones(8))),
    "no transform": 3.0,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_that_cannot_be(transform: Transform) -> None:
    model = mlp()
    with refused(model, MethodError, "fixed", "'up'"):
        quantize(model, Fixed(transforms={"up": transform}))


@pytest.mark.parametrize("stage", [Stage.ROTATE, Stage.SCALE])
def test_a_static_range_behind_a_rotation_takes_two_passes(stage: Stage) -> None:
    model, method = mlp(), Fixed(stage, transforms={"up": Transform(rotation=Rotation(16))})
    with refused(model, CalibrationError, "static", "rotation", "not a generator"):
        quantkit.quantize(model, method, calibration=iter([normal(2, 5, 16)]), scheme="w8a8-static", progress=False)


def test_integers_are_chosen_last() -> None:
    model = mlp()
    codes = Codes(torch.zeros(24, 16, dtype=torch.int8), torch.ones(24, 1))
    with refused(model, MethodError, "fixed", "Stage.ROUND"):
        quantize(model, Fixed(Stage.SCALE, codes={"up": codes}))
    with refused(model, MethodError, "fixed", "'up'", "tuple"):
        quantize(model, Fixed(Stage.ROUND, codes={"up": (codes.codes, codes.scale)}))
    with refused(model, MethodError, "fixed", "'up'", "Stage.ROUND"):
        quantize(model, Fixed(Stage.ROUND, codes={"up": codes}, transforms={"up": Transform(scale=torch.full((16,), 2.0))}))


@pytest.mark.parametrize("later", [Rotation(8), None], ids=["rotation", "scale"])
def test_a_rotation_is_last(later: Rotation | None) -> None:
    model, first = mlp(), Rotate(Stage.ROTATE, transforms={"up": Transform(rotation=Rotation(8))})
    second = Transform(rotation=later) if later else Transform(scale=torch.ones(16))
    with refused(model, MethodError, "fixed", "'up'", "put the rotation last"):
        quantize(model, [first, Fixed(Stage.ROTATE, transforms={"up": second})])


NOTES = {
    "none": {"up": None},
    "tensor": {"up": {"scale": torch.ones(2)}},
    "unknown site": {"upp": {"alpha": 1.0}},
    "a list": ["up"],
    "circular": {"up": (circle := {})},
}
circle["up"] = circle


@pytest.mark.parametrize("notes", NOTES.values(), ids=NOTES)
def test_notes_that_cannot_be_saved(notes: Any) -> None:
    model = mlp()
    with refused(model, MethodError, "fixed"):
        quantize(model, Fixed(notes=notes))


class Odd(quantkit.PerSite):
    """A calibrator that does one thing wrong."""

    name, stage, statistics = "odd", Stage.SCALE, ()

    def __init__(self, does: Any) -> None:
        self.does = does

    def plan_site(self, site: Any) -> Any:
        return self.does(site)


def test_a_bare_transform() -> None:
    model = mlp()
    with refused(model, MethodError, "odd", "Transform", "notes"):
        quantize(model, Odd(lambda site: Transform()))


def test_a_statistic_that_was_not_asked_for() -> None:
    model = mlp()
    with refused(model, MethodError, "odd", "Range", "'up'", "statistics"):
        quantize(model, Odd(lambda site: site.statistic(Range)))

    with refused(model := llama(), MethodError, "odd", "TokenSample", "q_proj", "statistics"):
        quantize(model, Odd(lambda site: site.sampled()), calibration=None)


def test_a_range_after_a_rotation() -> None:
    class Late(Fixed):
        def plan(self, view: Any) -> Plan:
            return Plan(notes={site.name: {"top": site.statistic(Range).absmax.max().item()} for site in view.sites})

    model = mlp()
    with refused(model, MethodError, "fixed", "rotation", "TokenSample"):
        quantize(model, [Rotate(Stage.ROTATE, transforms={"up": Transform(rotation=Rotation(8))}), Late(Stage.ROUND)])


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
        quantize(model, method)


def test_a_site_that_nobody_plans() -> None:
    class Forgotten(quantkit.PerSite):
        name, stage = "forgotten", Stage.SCALE

    model = mlp()
    with refused(model, MethodError, "forgotten", "Forgotten", "plan_site"):
        quantize(model, Forgotten())


def test_no_plan() -> None:
    model, method = mlp(), Odd(None)
    method.plan = lambda view: None  # type: ignore[method-assign]
    with refused(model, MethodError, "odd", "NoneType", "Plan"):
        quantize(model, method)


def test_data_that_nobody_gave() -> None:
    model, method = llama(), Odd(None)
    method.plan = lambda view: list(view.batches())  # type: ignore[method-assign]
    with refused(model, CalibrationError, "odd", "calibration="):
        quantize(model, method, calibration=None)
    with refused(model, CalibrationError, "odd", "list or a DataLoader"):
        quantize(model, method, calibration=iter([tokens()]))


def test_a_range_that_no_scale_holds() -> None:
    """Each end is a float32, but not their distance."""
    model = nn.Sequential(nn.Identity(), nn.Linear(2, 2), nn.Linear(2, 2))
    data = [torch.tensor([[3e38, -3e38]])]
    for linear in (model[1], model[2]):
        nn.init.constant_(linear.weight, 0.0)
    with refused(model, CalibrationError, "'1'", "-3.0e+38", "symmetric"):
        quantize(model, "rtn", calibration=data, scheme="w8a8-static-asym")
    assert quantize(model, "rtn", calibration=data, scheme="w8a8-static")[1].input_scale.isfinite()


class Experts(nn.Module):
    """The second expert is called, but on no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.head = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(0, -2)
        return self.head(torch.cat([self.a(h), self.b(h[:0])]))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_an_expert_that_no_token_chose(scheme: str) -> None:
    model = quantize(Experts(), scheme=scheme)
    reasons = {layer.name: layer.reason for layer in quantkit.report(model).layers if layer.kind == "float"}
    assert reasons == {"b": "no calibration token reached it", "head": "output head"}
    model = Experts()
    with refused(model, CalibrationError, "no calibration token", "b", "targets="):
        quantize(model, scheme=scheme, targets=["b"])


def test_weights_are_copies() -> None:
    """A calibrator that writes to what it sees does not write to the model."""
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def scribble(site: Any) -> Any:
        for _, weight in site.weights():
            weight.zero_()
        return Transform(), {}

    quantize(model, Odd(scribble), scheme=None)
    assert_same(dict(model.state_dict()), before)


def test_plans_are_copied() -> None:
    """A plan may hold a parameter that its own fold changes."""

    def shifted(model: nn.Module, take: Any) -> Any:
        def plan(site: Any) -> Any:
            return Transform(shift=take(model.norm.bias.detach()), scale=torch.full((site.site.channels,), 4.0)), {}

        return quantize(model, Odd(plan), ignore=["down"]).state_dict()

    model = mlp()
    nn.init.normal_(model.norm.bias)
    assert_same(shifted(copy.deepcopy(model), lambda bias: bias), shifted(model, Tensor.clone))


def test_a_head_alone() -> None:
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False))
    model[1].weight = model[0].weight
    with refused(model, ModelError, "targets="):
        quantize(model, calibration=[torch.arange(6)[None]])


def test_a_model_that_samples_nothing() -> None:
    assert issubclass(CalibrationError, ValueError)
    model = llama().get_decoder()
    with refused(model, CalibrationError, "LlamaModel", "missing"):
        quantize(model, calibration=None)
    quantize(llama(), calibration=[tokens()])
