"""Weights that several modules share, told by their memory: an embedding and an output head that are tied, most often."""

from __future__ import annotations

import torch
from torch import nn


def owners_of_memory(model: nn.Module) -> dict[int, set[str]]:
    """Address of a parameter's memory -> names of all modules that have a parameter there. Empty parameters do not count."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel() and parameter.layout == torch.strided:  # others are not in one piece of memory
                owners.setdefault(parameter.data_ptr(), set()).add(name)
    return owners
