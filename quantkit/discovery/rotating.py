"""The probe with embeddings and norms changed as well, and the question whether an input arrives rotated.

:mod:`.residual` and :mod:`.heads` both ask it: they rotate what some modules put out and look at who reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.rotation import BlockRotation
from quantkit.discovery.probe import Probe, Trace, forward_replaced, norms_of
from quantkit.model.modules import linears_of, tensors_in

Edits = Mapping[str, Callable[[Tensor], Tensor]]
"""Name of a module -> a function from its output to another one."""

Seen = dict[tuple[str, int, int], Tensor]
"""Copies of tensors that modules were called on, by (name of the module, number of its call, number of the tensor in it)."""


class RotationProbe:
    """Runs one model on one batch with edited outputs.

    Args:
        model: any module; it is only watched.
        batch: a small batch.

    Attributes:
        linears, norms: name -> module.
        probe: the probe that it is made of.
        eps: epsilon of the shortest format among the parameters: what has passed through that is no more precise, whatever
            it is added to.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.linears, self.norms = model, linears_of(model), norms_of(model)
        self.probe = Probe(model, self.linears, self.norms, batch)
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
        self.eps = max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(torch.float32).eps)

    def run(
        self,
        edits: Edits = MappingProxyType({}),
        *,
        twins: Mapping[str, nn.Module] = MappingProxyType({}),
        multipliers: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Trace:
        """One pass of the probe.

        Args:
            edits: for linears and embeddings.
            twins: name of a norm -> the module that runs in its place.
            multipliers: name of a linear or norm -> ``[N]``, by which its output is multiplied.
        """
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.Embedding) and name in edits:
                    change = module.register_forward_hook(lambda _, args, y, edit=edits[name]: edit(y), prepend=True)
                    stack.callback(change.remove)
            for name, twin in twins.items():
                stack.enter_context(forward_replaced(self.model.get_submodule(name), twin.forward))
            return self.probe.run(multipliers, edits=edits)

    @contextmanager
    def watching(self, width: int) -> Iterator[Seen]:
        """Collects every tensor ``[..., width]`` that some module is called on while the context is open."""
        seen: Seen = {}
        calls: dict[str, int] = {}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                calls[name] = calls.get(name, -1) + 1
                for index, tensor in enumerate(tensors_in([*args, *kwargs.values()])):
                    if tensor.dim() > 1 and tensor.shape[-1] == width:
                        seen[name, calls[name], index] = tensor.detach().clone()

            return hook

        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                stack.callback(module.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
            yield seen

    def rotated(self, before: Trace, after: Trace, name: str, rotation: BlockRotation) -> bool:
        """Whether all inputs of this linear are those of ``before``, rotated."""
        return self.agree([rotate(x, rotation) for x in before.inputs[name]], after.inputs[name])

    def agree(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
        """Whether two lists of tensors are the same but for the rounding of the model's dtype, by their Euclidean norms."""

        def near(a: Tensor, b: Tensor) -> bool:
            if a.shape != b.shape:
                return False
            return bool((a.double() - b.double()).norm() <= max(1e-5, 4 * self.eps) * a.double().norm())

        return len(wanted) == len(got) and all(near(a, b) for a, b in zip(wanted, got, strict=True))


def rotate(x: Tensor, rotation: BlockRotation) -> Tensor:
    """``x R`` in the dtype of ``x``."""
    return rotation.apply(x).to(x.dtype)
