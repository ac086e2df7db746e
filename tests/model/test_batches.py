"""The batch that a model is called on is a copy: what the model does to it in place is gone afterwards."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_same, llama, normal, quantized, tokens
from torch import Tensor, nn

import quantkit
from quantkit.model.modules import all_tensors, call


class Norm(nn.Module):
    """RMSNorm, which may leave what it normalizes in the place of its input."""

    def __init__(self, width: int, in_place: bool) -> None:
        super().__init__()
        self.weight, self.in_place = nn.Parameter(torch.rand(width) + 0.5), in_place

    def forward(self, x: Tensor) -> Tensor:
        factor = x.pow(2).mean(-1, keepdim=True).rsqrt()
        return (x.mul_(factor) if self.in_place else x * factor) * self.weight


class Block(nn.Module):
    """A residual block, which may add to its input in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.in_place = Norm(32, in_place), nn.Linear(32, 48), nn.Linear(48, 32), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(self.norm(x.clone())).relu())
        return x.add_(y) if self.in_place else x + y


class Net(nn.Module):
    """Ids below zero are masked, which may be done in place, and so may all that follows."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(20, 32), nn.ModuleList(Block(in_place) for _ in range(2))
        self.head, self.in_place = nn.Linear(32, 8), in_place

    def forward(self, ids: Tensor, scale: Tensor) -> Tensor:
        if self.in_place:
            ids.sub_(5).clamp_(0)
            scale.mul_(2)
        else:
            ids, scale = (ids - 5).clamp(0), scale * 2
        x = self.embed(ids) * scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("method", ["smoothquant", ["rotate", "smoothquant"], "omniquant"], ids=str)
def test_models_that_work_in_place(method: Any) -> None:
    """They are quantized to the same bits as those that do not, with all their folds, and the data stays what it was."""
    data = [(torch.randint(0, 20, (3, 20)), normal(3, 20, 1, seed=i).abs() + 0.5) for i in range(3)]
    before, models = copy.deepcopy(data), [Net(False).eval(), Net(True).eval()]
    for model in models:
        quantized(model, method, calibration=data, scheme="w8a8-static")
        assert_same(data, before)
    assert_same(models[1].state_dict(), models[0].state_dict())
    assert quantkit.report(models[1]).layers == quantkit.report(models[0]).layers
    assert sum(layer.folded_into is not None for layer in quantkit.report(models[1]).layers) >= 2


def test_a_cache_in_a_batch_does_not_grow() -> None:
    model = llama()
    with torch.no_grad():
        cache = model(tokens(1, 6), use_cache=True).past_key_values
    batch = {"input_ids": tokens(1, 8), "past_key_values": cache}
    quantized(model, calibration=[batch])
    assert cache.get_seq_length() == 6


def test_what_is_one_in_a_batch_stays_one() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor, nested: Any, lock: Any = None) -> Tensor:
            assert nested["x"][0] is x
            assert nested.__class__ is transformers.BatchEncoding or lock is not None
            return x.add_(1)

    x = torch.zeros(2)
    for batch in ((x, transformers.BatchEncoding({"x": [x]})), {"x": x, "nested": {"x": (x,)}, "lock": threading.Lock()}):
        assert_same(call(Same(), batch), torch.ones(2))
        assert_same(all_tensors(batch)[0], torch.zeros(2))
