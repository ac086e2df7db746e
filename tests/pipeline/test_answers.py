"""What a calibrator answers is looked at before anything is done with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import Fixed, FixedRotate, Odd, llama, mlp, quantized, refused

from quantkit import (
    Codes,
    MethodError,
    Plan,
    Range,
    Rotation,
    Stage,
    Transform,
)

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
        quantized(model, Fixed(Stage.ROUND, codes={"up": codes}))


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
        quantized(model, Fixed(transforms={"up": transform}))


def test_integers_are_chosen_last() -> None:
    model = mlp()
    codes = Codes(torch.zeros(24, 16, dtype=torch.int8), torch.ones(24, 1))
    with refused(model, MethodError, "fixed", "Stage.ROUND"):
        quantized(model, Fixed(Stage.SCALE, codes={"up": codes}))
    with refused(model, MethodError, "fixed", "'up'", "tuple"):
        quantized(model, Fixed(Stage.ROUND, codes={"up": (codes.codes, codes.scale)}))
    with refused(model, MethodError, "fixed", "'up'", "Stage.ROUND"):
        quantized(model, Fixed(Stage.ROUND, codes={"up": codes}, transforms={"up": Transform(scale=torch.full((16,), 2.0))}))


@pytest.mark.parametrize("later", [Rotation(8), None], ids=["rotation", "scale"])
def test_a_rotation_is_last(later: Rotation | None) -> None:
    model, first = mlp(), FixedRotate(Stage.ROTATE, transforms={"up": Transform(rotation=Rotation(8))})
    second = Transform(rotation=later) if later else Transform(scale=torch.ones(16))
    with refused(model, MethodError, "fixed", "'up'", "put the rotation last"):
        quantized(model, [first, Fixed(Stage.ROTATE, transforms={"up": second})])


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
        quantized(model, Fixed(notes=notes))


def test_a_bare_transform() -> None:
    model = mlp()
    with refused(model, MethodError, "odd", "Transform", "notes"):
        quantized(model, Odd(lambda site: Transform()))


def test_a_statistic_that_was_not_asked_for() -> None:
    model = mlp()
    with refused(model, MethodError, "odd", "Range", "'up'", "statistics"):
        quantized(model, Odd(lambda site: site.statistic(Range)))

    with refused(model := llama(), MethodError, "odd", "TokenSample", "q_proj", "statistics"):
        quantized(model, Odd(lambda site: site.sampled()), calibration=None)


def test_a_range_after_a_rotation() -> None:
    class Late(Fixed):
        def plan(self, view: Any) -> Plan:
            return Plan(notes={site.name: {"top": site.statistic(Range).absmax.max().item()} for site in view.sites})

    model = mlp()
    with refused(model, MethodError, "fixed", "rotation", "TokenSample"):
        quantized(model, [FixedRotate(Stage.ROTATE, transforms={"up": Transform(rotation=Rotation(8))}), Late(Stage.ROUND)])


def test_no_plan() -> None:
    model, method = mlp(), Odd(None)
    method.plan = lambda view: None  # type: ignore[method-assign]
    with refused(model, MethodError, "odd", "NoneType", "Plan"):
        quantized(model, method)
