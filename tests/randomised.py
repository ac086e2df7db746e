"""Models of every family with random weights that make every layer matter, and how far the outputs of two are apart."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from families import FAMILIES
from torch import Tensor, nn

import quantkit
from quantkit.core.numerics import sqnr_db
from quantkit.discovery.probe import norms_of
from quantkit.model.modules import is_conv1d, weight_of


@functools.cache
def _built(name: str, outliers: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FAMILIES[name].build().eval()
        randomise(model, outliers)
    return model


def build(name: str, *, outliers: bool = False) -> nn.Module:
    return copy.deepcopy(_built(name, outliers))


@torch.no_grad()
def randomise(model: nn.Module, outliers: bool) -> None:
    """Weights large enough for every layer to matter, no bias zero, and gains of norms that single out a few channels."""
    for module in norms_of(model).values():
        for name, p in module.named_parameters():
            if "bias" in name:
                p.normal_(0, 0.3)
            else:
                gain = torch.rand_like(p) + 0.5
                if outliers:
                    hit = torch.randperm(len(p))[: max(1, len(p) // 50)]
                    gain[hit] *= 20 + 40 * torch.rand(len(hit))
                p.copy_(gain - 1 if not p.any() else gain)  # a parameter that starts at zero means 1 + p
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module):
            fan_in = 1 if isinstance(module, nn.Embedding) else weight_of(module).shape[1]
            module.weight.normal_(0, 0.6 * fan_in**-0.5)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.1)
        for p in module.parameters(recurse=False):
            if p.dim() == 3 and not any(module.children()):  # experts held as one parameter
                p.normal_(0, max(p.shape[1:]) ** -0.5)


def worst_sqnr(wanted: list[Tensor], got: list[Tensor]) -> float:
    """In decibels, over all outputs, which must agree in shape and dtype and be finite."""
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in wanted]
    assert all(t.isfinite().all() for t in got)
    return min(sqnr_db(a, b) for a, b in zip(wanted, got, strict=True))


def rotated(model: nn.Module, batch: Any, method: Any = "rotate", **options: Any) -> nn.Module:
    """A model whose spaces are rotated in its weights, in floating point."""
    return quantkit.quantize(model, method, scheme=None, calibration=[batch], progress=False, **options)
