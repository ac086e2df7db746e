"""A model as a chain of blocks: which modules these are, what a sample is, and where hidden states are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, gpt2, llama, mlp, normal, tokens
from torch import nn

from quantkit import MethodError
from quantkit.calibration.blocks import HiddenStates, find_blocks, samples_of


def test_blocks_are_found() -> None:
    assert find_blocks(llama(), ["model.layers.0.mlp.up_proj"]) == ("model.layers.0", "model.layers.1")
    assert find_blocks(gpt2(), ["transformer.h.0.attn.c_attn"]) == ("transformer.h.0",)
    assert find_blocks(
        nn.ModuleDict({"blocks": nn.ModuleList(mlp() for _ in range(3)), "head": nn.Linear(16, 4)}), ["blocks.2.up"]
    ) == ("blocks.0", "blocks.1", "blocks.2")
    sequential = nn.Sequential(mlp(), mlp())
    assert find_blocks(sequential, ["0.up", "1.up"]) == ("0", "1")
    with pytest.raises(MethodError, match="most of the layers"):
        find_blocks(nn.ModuleDict({"a": sequential, "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)}), ["a.0.up", "b", "c"])
    outer = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([mlp(), mlp()])}) for _ in range(2)])
    assert find_blocks(outer, ["0.experts.0.up", "0.experts.1.up", "1.experts.0.up"]) == ("0", "1")


def test_samples() -> None:
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    assert [s.shape for s in samples_of([ids, ids], 4)] == [(1, 8)] * 4
    first = samples_of([{"input_ids": ids, "attention_mask": mask}], 9)[1]
    assert_same(first, {"input_ids": ids[1:2], "attention_mask": mask[1:2]})
    assert len(samples_of([(ids, torch.arange(8)[None])], 9)) == 1  # positions for all
    assert len(samples_of([normal(5, 16)], 9)) == 1  # rows are tokens


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_hidden_states(place: Any) -> None:
    states, x = HiddenStates(place, torch.device("cpu")), normal(2, 3)
    states[0] = x
    states[1] = x.to(torch.bfloat16)
    before = x.clone()
    x += 1
    assert_same(states[0], before)
    states[0] = x
    assert_same(states[0], x)
    states[0] = normal(4, 5)
    assert_same(states[0], normal(4, 5))
    assert_same(states[1], before.to(torch.bfloat16))
