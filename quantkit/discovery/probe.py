"""A model under the microscope: every linear answers with fixed synthetic values, so that nothing propagates.

Because the outputs of linears do not depend on their inputs here, multiplying the output of one module shows up at
the first linears behind it and nowhere else. What is multiplied by a power of two stays exact in every float format,
so channels can be read off bit patterns, at the cost of attention and element-wise work only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantkit.model.experts import running_everywhere
from quantkit.model.modules import call, evaluating, tensors_in, weight_of


@dataclass
class Trace:
    """What one probed forward pass showed: the inputs of each linear, call by call, and the model's outputs.

    ``identities`` tells which linears read the very same tensor: storage, view and version.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    identities: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # so that no address is used twice within the pass
    outputs: list[Tensor] = field(default_factory=list)
    norm_calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    norm_widths: dict[str, int] = field(default_factory=dict)


class Probe:
    """Runs the model with synthetic linear outputs and chosen multipliers on the outputs of modules.

    Args:
        model: any module.
        linears: name -> linear; their matrix products are skipped.
        norms: name -> module with per-channel parameters.
        batch: a small batch, see :func:`quantkit.model.modules.call`.
    """

    def __init__(self, model: nn.Module, linears: dict[str, nn.Module], norms: dict[str, nn.Module], batch: Any):
        self.model, self.linears, self.norms, self.batch = model, linears, norms, batch
        self._synthetic: dict[tuple[str, int], Tensor] = {}

    def run(
        self,
        multipliers: dict[str, Tensor],
        *,
        orders: dict[str, Tensor] | None = None,
        mode: TorchFunctionMode | None = None,
        edits: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    ) -> Trace:
        """One forward pass; ``multipliers[name] [N]`` scale the output of that linear or norm, and ``orders[name] [N]`` say
        which old row each new one of a linear is.

        ``edits[name]`` make another tensor of the output of that linear.
        """
        trace = Trace()
        orders = orders or {}
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(running_everywhere(self.model))
            for name, linear in self.linears.items():
                answer = self._answer(name, linear, trace, multipliers.get(name), orders.get(name), mode, edits.get(name))
                stack.enter_context(forward_replaced(linear, answer))
            for name, norm in self.norms.items():
                handle = norm.register_forward_hook(self._watch(name, trace, multipliers.get(name)), with_kwargs=True)
                stack.callback(handle.remove)
            if mode is not None:
                stack.enter_context(mode)
            trace.outputs = list(tensors_in(call(self.model, self.batch)))
        return trace

    def _answer(
        self,
        name: str,
        linear: nn.Module,
        trace: Trace,
        multiplier: Tensor | None,
        order: Tensor | None,
        mode: Any,
        edit: Any = None,
    ) -> Any:
        rows = weight_of(linear).shape[0]
        weight = weight_of(linear)

        def forward(input: Tensor) -> Tensor:
            x = input
            calls = trace.inputs.setdefault(name, [])
            y = self._values(name, len(calls), (*x.shape[:-1], rows), weight)
            calls.append(x.clone())
            key = (x.data_ptr(), x.numel(), x.stride(-1), 0 if x.is_inference() else x._version)
            trace.identities.setdefault(name, []).append(key)
            trace.alive.append(x)
            y = y.clone() if multiplier is None else y * multiplier.to(y)
            y = y if order is None else y[..., order.to(y.device)]
            y = y if edit is None else edit(y)
            if isinstance(mode, TopKWatch):
                mode.mark(name, y)
            return y

        return forward

    def _values(self, name: str, index: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Heavy-tailed values of both signs in every channel: they expose curvature, clipping and dead branches."""
        known = self._synthetic.get((name, index))
        if known is None or known.shape != shape:
            random = torch.Generator().manual_seed(zlib.crc32(f"{name}/{index}".encode()))
            size = torch.exp2(torch.rand(shape, generator=random) * 6 - 3)
            sign = torch.randint(0, 2, shape, generator=random).float() * 2 - 1
            if len(flat := sign.view(-1, shape[-1])) > 1:
                flat[0], flat[1] = 1.0, -1.0
            known = (size * sign).to(like.dtype).to(like.device)
            self._synthetic[name, index] = known
        return known

    @staticmethod
    def _watch(name: str, trace: Trace, multiplier: Tensor | None) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if isinstance(output, Tensor) and any(p.numel() == output.shape[-1] for p in module.parameters()):
                trace.norm_calls.setdefault(name, (args, kwargs))
                trace.norm_widths[name] = output.shape[-1]
                return output if multiplier is None else output * multiplier.to(output)
            return output

        return hook


class TopKWatch(TorchFunctionMode):
    """Notes which linears' outputs end in a top-k choice: these are routers.

    A linear's output is followed through functions that keep its element count and last dimension (softmax, casts,
    biases), so attention scores and vocabularies do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.routers: set[str] = set()
        self._origin: dict[int, str] = {}
        self._alive: list[Tensor] = []  # keeps ids unique for the length of the pass

    def mark(self, name: str, y: Tensor) -> None:
        self._origin[id(y)] = name
        self._alive.append(y)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = next((a for a in args if isinstance(a, Tensor) and id(a) in self._origin), None)
        if source is not None:
            name = self._origin[id(source)]
            if getattr(func, "__name__", "") in ("topk", "argmax", "sort", "argsort"):
                self.routers.add(name)
            elif isinstance(result, Tensor) and result.numel() == source.numel() and result.shape[-1:] == source.shape[-1:]:
                self.mark(name, result)
        return result


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Leaf modules whose only floating parameters are vectors: every kind of norm, and layer scales."""
    found = {}
    for name, module in model.named_modules():
        parameters = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if parameters and all(p.dim() == 1 for p in parameters) and not any(module.children()):
            found[name] = module
    return found


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Inside, calling ``module`` calls ``forward``."""
    own = module.__dict__.get("forward")  # accelerate and others replace it on the instance too
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
