"""Weights that several modules share, told by their memory: an embedding and an output head that are tied, most often."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import MethodError
from quantkit.model.modules import linears_of


def owners_of_memory(model: nn.Module) -> dict[int, set[str]]:
    """Address of a parameter's memory -> names of all modules that have a parameter there. Empty parameters do not count.

    On the meta device, where there is no memory, the parameter itself counts.
    """
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel() and parameter.layout == torch.strided:  # others are not in one piece of memory
                owners.setdefault(_place(parameter), set()).add(name)
    return owners


def _place(parameter: Tensor) -> int:
    return parameter.data_ptr() or id(parameter)


def tied_to_embeddings(model: nn.Module) -> list[str]:
    """Names of linears that share their weight with embeddings and with nothing else, as output heads do."""
    owners, modules = owners_of_memory(model), dict[str, Any](model.named_modules())

    def others(name: str) -> set[str]:
        return owners.get(_place(modules[name].weight), set()) - {name}

    return [n for n in linears_of(model) if others(n) and all(isinstance(modules[o], nn.Embedding) for o in others(n))]


def untie(model: nn.Module, names: Iterable[str], undo: ExitStack) -> dict[str, int]:
    """Give the linears called ``names`` weights of their own. Closing ``undo`` ties them again.

    Returns:
        Their names and the sizes of the new weights in bytes.

    Raises:
        MethodError: transformers would tie them again on loading.
    """
    apart = {}
    for name in names:
        linear: Any = model.get_submodule(name)
        old = linear.weight
        undo.callback(setattr, linear, "weight", old)
        linear.weight = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
        apart[name] = old.nbytes
    if apart:
        _tell_transformers(model, undo)
    keys = {key.removesuffix(".weight") for key in getattr(model, "all_tied_weights_keys", ())}
    again = list(apart) if apart and _ties_again(getattr(model, "config", None)) else [name for name in apart if name in keys]
    if again:
        raise MethodError(
            f"{', '.join(again)} has to have a weight of its own, and {type(model).__name__} would tie it again on loading"
        )
    return apart


def _tell_transformers(model: Any, undo: ExitStack) -> None:
    """Note in the model's config that head and embedding are two weights now, for whoever opens a checkpoint of it."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        if getattr(config, "tie_word_embeddings", False):
            undo.callback(setattr, config, "tie_word_embeddings", True)
            config.tie_word_embeddings = False
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys") and hasattr(module, "get_expanded_tied_weights_keys"):
            undo.callback(setattr, module, "all_tied_weights_keys", module.all_tied_weights_keys)
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=False)


def _ties_again(config: Any) -> bool:
    """Whether a config of transformers says that weights are tied when it is read again, as that of T5 always does."""
    read = getattr(type(config), "from_dict", None)
    return read is not None and bool(getattr(read(config.to_dict()), "tie_word_embeddings", False))
