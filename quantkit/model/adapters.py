"""Adapters of PEFT, such as LoRA's: small trainable modules around, beside or instead of the modules of a frozen model.

PEFT puts a layer of its own in the place of an adapted module. The module that was there is one of its children, the *base*,
and all of its other children are the adapter. PEFT is never imported here: without it, a model has none of its classes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

WRAPPERS = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer", ("base_layer",)),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", ("original_module",)),  # modules_to_save, trainable tokens
)
"""Where the classes of layers with an adapter are, and the names of the child that is the base."""

WHOLE = (
    ("peft.peft_model", "PeftModel", ("base_model",)),  # beside it: encoders of prompts
    ("peft.tuners.tuners_utils", "BaseTuner", ("model", "lora_model")),  # beside it: the classifier of X-LoRA
)
"""The same for whole models."""


@dataclass(frozen=True)
class Adapters:
    """Where a model has adapters.

    Attributes:
        parts: names of the modules that are an adapter, or inside of one.
        reach: names of the modules whose input or output an adapter may read or change: its parts and its base.
        kinds: what the adapters call their children that have parameters, such as ``lora_A`` -> how many there are.
    """

    parts: frozenset[str]
    reach: frozenset[str]
    kinds: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Adapters:
        """Those of ``model``, by the classes of PEFT."""
        parts: set[str] = set()
        reach: set[str] = set()
        kinds: Counter[str] = Counter()
        for name, module in model.named_modules():
            wraps = _base_of(module, WRAPPERS)
            base = wraps or _base_of(module, WHOLE)
            if base:
                inside = [inner for inner, _ in module.named_modules(prefix=name)][1:]
                own = {inner for inner in inside if inner.removeprefix(f"{name}.").split(".")[0] not in base}
                parts |= own
                reach |= set(inside) if wraps else own
                trained = [child for child, inner in module.named_children() if any(True for _ in inner.parameters())]
                kinds.update(child for child in trained if f"{name}.{child}".lstrip(".") in own)
        return cls(frozenset(parts), frozenset(reach), dict(kinds))

    @property
    def said(self) -> list[str]:
        """For the report: a sentence, if there are any."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return [f"adapters stay as they are, in floating point: {kinds}"] if kinds else []


def has_adapter(module: nn.Module) -> bool:
    """Whether the module is a layer of PEFT around another module."""
    return bool(_base_of(module, WRAPPERS))


def _base_of(module: nn.Module, classes: tuple[tuple[str, str, tuple[str, ...]], ...]) -> tuple[str, ...]:
    """The possible names of the child of ``module`` that is the base; empty if it is of none of these classes."""
    for file, cls, base in classes:
        if isinstance(module, getattr(sys.modules.get(file), cls, ())):
            return base
    return ()
