"""Several operands as one: products of one activation side by side, and operands of one shape on top of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import MethodError
from quantkit.core.facts import Facts
from quantkit.core.operand import Operand
from quantkit.core.rewrite import Rewrite
from quantkit.core.rotation import Rotation


def joined(operands: Sequence[Operand]) -> Operand:
    """One product in place of several that read the same activation: their output features, one after the other.

    So q, k and v become one. It has a bias if any of them has one.

    Raises:
        MethodError: they differ in what is done to the activation, or in their formats.
    """
    first = operands[0]
    for other in operands[1:]:
        if difference := input_difference(first, other):
            raise MethodError(f"operands cannot be joined: they differ in {difference}")
    biases = [o.scale.new_zeros(o.out_features) if o.bias is None else o.bias for o in operands]

    def below(name: str) -> Tensor | None:
        parts = [getattr(o, name) for o in operands]
        return None if parts[0] is None else torch.cat(parts)

    stored, scale = below("stored"), below("scale")
    assert stored is not None
    assert scale is not None
    return replace(
        first,
        stored=stored,
        scale=scale,
        multipliers=below("multipliers"),
        outlier_weight=below("outlier_weight"),
        bias=None if all(o.bias is None for o in operands) else torch.cat(biases),
    )


def input_difference(one: Operand, other: Operand) -> str | None:
    """In what two operands differ as to formats and the treatment of the activation; None if in nothing."""
    for name in ("weight", "input"):
        if getattr(one, name) != getattr(other, name):
            return name
    pairs = {f"input {name}": (getattr(one, name), getattr(other, name)) for name in ("input_scale", "input_zero_point")}
    pairs |= {f.name: (getattr(one.rewrite, f.name), getattr(other.rewrite, f.name)) for f in fields(Rewrite)}
    return next((name for name, pair in pairs.items() if not _same(*pair)), None)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Rotation) and isinstance(other, Rotation):
        return one.block == other.block and _same(one.signs, other.signs)
    return type(one) is type(other) and bool(one == other)


@dataclass(frozen=True, eq=False)
class Stack:
    """Operands of one shape and one format, such as the experts of a layer, in tensors ``[E, ...]``.

    Attributes:
        facts: of each of them.
        tensors: by the names of :data:`TENSORS`, each with a first dimension of E.
    """

    facts: Facts
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, operands: Sequence[Operand]) -> Stack:
        """Copies of ``operands`` on top of each other.

        Raises:
            MethodError: they differ in shape or formats, or there is none.
        """
        if not operands:
            raise MethodError("there is no operand to stack")
        facts, tensors = operands[0].facts, [operand.tensors() for operand in operands]
        for operand, own in zip(operands, tensors, strict=True):
            if operand.facts != facts or {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors[0].items()}:
                raise MethodError(f"operands cannot be stacked: {operand.facts} is not {facts}, or its tensors are others")
        return cls(facts, {name: torch.stack([own[name] for own in tensors]) for name in tensors[0]})

    def __len__(self) -> int:
        return len(self.tensors["weight"])

    def __getitem__(self, index: int) -> Operand:
        """One of them, as a view."""
        return Operand.of(self.facts, {name: tensor[index] for name, tensor in self.tensors.items()})
