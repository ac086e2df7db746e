"""Calibration data: every way to pass it, what is refused, and what a model samples by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, Fixed, Odd, assert_same, llama, mlp, normal, quantized, refused, tokens
from torch import Tensor, nn

import quantkit
from quantkit import (
    CalibrationError,
    Rotation,
    Stage,
    Transform,
)
from quantkit.calibration.data import probe_batch


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


def padded(hidden: slice, rows: slice = slice(None), **masks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Four samples of 40 ids, with padding in some of the ``rows``, and ``masks`` made of what is kept."""
    ids, kept = tokens(4, 40), torch.ones(4, 40, dtype=torch.int64)
    ids[rows, hidden], kept[rows, hidden] = 0, 0
    return {"input_ids": ids} | {name: mask(kept) for name, mask in masks.items()}


PADDED: dict[str, dict[str, Tensor]] = {
    "right": padded(slice(8, None), attention_mask=Tensor.long),
    "left": padded(slice(None, 30), attention_mask=Tensor.long),
    "left, as floats": padded(slice(None, 30), attention_mask=Tensor.float),
    "left, as truth values": padded(slice(None, 30), attention_mask=Tensor.bool),
    "all of the first sample": padded(slice(None), slice(0, 1), attention_mask=Tensor.long),
    "all but the last sample": padded(slice(None), slice(0, 3), attention_mask=Tensor.long),
    "in the middle": padded(slice(2, 34), attention_mask=Tensor.long),
}


@pytest.mark.parametrize("case", PADDED)
def test_padding_costs_no_folds(case: str, tmp_path: Path) -> None:
    """A model is probed with tokens that it reads, and comes out as it would without padding."""
    model = quantized(llama(), calibration=[PADDED[case]])
    layers = quantkit.report(model).layers
    assert all(layer.folded_into for layer in layers if layer.kind == "int8"), [layer.reason for layer in layers]
    assert (quantkit.export(model, tmp_path / "out") / "config.json").is_file()


class Masked(nn.Module):
    """Counts the tokens of a batch that are masked, by all conventions."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        return input_ids.float()


@pytest.mark.parametrize("tokens_", [1, 16, 40, 64])
@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (lambda kept: kept == 0, "key_padding_mask"),
        (lambda kept: torch.where(kept == 0, -torch.inf, 0.0), "key_padding_mask"),
        (lambda kept: kept, "attention_mask"),
        (lambda kept: torch.where(kept == 0, -1e9, 0.0), "decoder_attention_mask"),
    ],
)
def test_the_piece_is_what_masks_leave(name: str, mask: Callable[[Tensor], Tensor], tokens_: int) -> None:
    batch = padded(slice(None, 30), **{name: mask})
    batch["input_ids"][2], batch["input_ids"][2, :8] = 7, 0  # the sample with most tokens
    kept = (batch["input_ids"] != 0).long()
    batch[name] = mask(kept)
    for given in (batch, (batch["input_ids"], batch[name])) if name == "attention_mask" else (batch,):
        piece = probe_batch(Masked(), given, tokens_)
        ids = piece["input_ids"] if isinstance(piece, dict) else piece[0]
        assert ids.shape == (1, min(tokens_, 40))
        assert int((ids != 0).sum()) == min(tokens_, 32)


def test_masks_that_leave_nothing_or_say_more() -> None:
    """Then the batch stays whole: all of it is masked somewhere, or a mask says who may read whom."""
    for batch in (
        padded(slice(None), attention_mask=Tensor.long),
        padded(slice(None, 20), attention_mask=Tensor.long, decoder_attention_mask=torch.zeros_like),
        padded(slice(None, 30), attention_mask=lambda kept: kept[:, None, None, :].bool()),
    ):
        assert_same(probe_batch(Masked(), batch), batch)
    plain = padded(slice(0, 0), attention_mask=Tensor.long)
    assert_same(probe_batch(Masked(), plain), {name: tensor[:1, :16] for name, tensor in plain.items()})
