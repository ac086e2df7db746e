"""Calibration data: every way to pass it, what is refused, and what a model samples by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import VOCAB, Fixed, Odd, assert_same, llama, mlp, normal, quantized, refused, tokens

import quantkit
from quantkit import (
    CalibrationError,
    Rotation,
    Stage,
    Transform,
)


class Vocabulary:
    """A tokenizer, as far as quantkit asks: one token for each character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([1] if add_special_tokens else []) + [3 + ord(c) % (VOCAB - 3) for c in text]}


def test_ways_to_pass_data() -> None:
    model, ids = llama(), tokens(1, 20)
    text = "".join(chr(int(i) - 3 + (VOCAB - 3)) for i in ids[0])
    wanted = quantized(copy.deepcopy(model), calibration=[ids]).state_dict()
    ways: dict[str, Any] = {
        "dict": [{"input_ids": ids}],
        "tuple": [(ids,)],
        "iterator": iter([ids]),
        "generator": (ids for _ in range(1)),
        "loader": torch.utils.data.DataLoader(ids, batch_size=1),
        "strings": [text[:7], text[7:]],
    }
    for way, data in ways.items():
        got = quantized(copy.deepcopy(model), calibration=data, tokenizer=Vocabulary()).state_dict()
        assert_same(got, wanted, way)


def test_every_batch_of_a_generator_counts() -> None:
    """The first one is looked at beforehand, and must not be lost."""
    batches, model = [normal(1, 4, 16, seed=i) * (3 - i) for i in range(3)], mlp()
    wanted = quantized(copy.deepcopy(model), scheme="w8a8-static", calibration=batches).state_dict()
    assert_same(quantized(copy.deepcopy(model), scheme="w8a8-static", calibration=(b for b in batches)).state_dict(), wanted)
    assert not torch.equal(
        quantized(model, scheme="w8a8-static", calibration=batches[1:]).up.input_scale, wanted["up.input_scale"]
    )


def test_a_language_model_samples_its_own_data() -> None:
    model = llama(max_position_embeddings=24)
    first, second, other = (quantized(copy.deepcopy(model), calibration=None, seed=seed) for seed in (1, 1, 2))
    assert_same(first.state_dict(), second.state_dict())
    assert not torch.equal(first.model.layers[0].input_layernorm.weight, other.model.layers[0].input_layernorm.weight)
    assert "sampled" in quantkit.report(first).calibration


def test_the_global_seed_is_neither_read_nor_moved() -> None:
    model = llama(max_position_embeddings=24)
    torch.manual_seed(5)
    first = quantized(copy.deepcopy(model), calibration=None).state_dict()
    after = torch.rand(1)
    assert_same(quantized(model, calibration=None).state_dict(), first)
    torch.manual_seed(5)
    assert_same(torch.rand(1), after)


def test_strings_that_say_nothing() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3] * len(text)}

    for texts, words in ((["", "a"], ["fewer than two tokens"]), (["abc", 3], ["mixes strings", "int"])):
        model = llama()
        with refused(model, CalibrationError, *words):
            quantized(model, calibration=texts, tokenizer=tokenizer)


@pytest.mark.parametrize("stage", [Stage.ROTATE, Stage.SCALE])
def test_a_static_range_behind_a_rotation_takes_two_passes(stage: Stage) -> None:
    model, method = mlp(), Fixed(stage, transforms={"up": Transform(rotation=Rotation(16))})
    with refused(model, CalibrationError, "static", "rotation", "not a generator"):
        quantkit.quantize(model, method, calibration=iter([normal(2, 5, 16)]), scheme="w8a8-static", progress=False)


def test_data_that_nobody_gave() -> None:
    model, method = llama(), Odd(None)
    method.plan = lambda view: list(view.batches())  # type: ignore[method-assign]
    with refused(model, CalibrationError, "odd", "calibration="):
        quantized(model, method, calibration=None)
    with refused(model, CalibrationError, "odd", "list or a DataLoader"):
        quantized(model, method, calibration=iter([tokens()]))


def test_a_model_that_samples_nothing() -> None:
    assert issubclass(CalibrationError, ValueError)
    model = llama().get_decoder()
    with refused(model, CalibrationError, "LlamaModel", "missing"):
        quantized(model, calibration=None)
    quantized(llama(), calibration=[tokens()])
