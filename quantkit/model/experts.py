"""Mixtures of experts whose weights are one 3-D parameter, as transformers 5 stores them, taken apart into linears.

:class:`Experts` stands in for such a module. Its linears are views of the original parameters, so nothing is copied, and
putting the original back undoes it. It is used only where it computes the same, on random tokens and routes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.model.modules import linears_of, replace_module, weight_of

log = logging.getLogger("quantkit")


class Experts(nn.Module):
    """Linears ``0.gate_proj``, ``0.up_proj``, ``0.down_proj``, ``1.gate_proj``, ... in place of a fused experts module.

    Only the experts that some token is routed to run, one after the other.

    Args:
        fused: a module as transformers' ``use_experts_implementation`` makes them.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.is_concatenated = len(fused.down_proj), fused.has_gate, fused.is_concatenated
        self.everywhere = False
        names = ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")
        first, down = (_rows(fused, name) for name in names)
        for e in range(self.num_experts):
            expert = nn.Module()
            if self.has_gate:
                for name, part in zip(("gate_proj", "up_proj"), self._halves(first, e), strict=True):
                    setattr(expert, name, _linear(*part))
            else:
                expert.up_proj = _linear(*_of(first, e))
            expert.down_proj = _linear(*_of(down, e))
            self.add_module(str(e), expert)
        # The family's own way to join gate and up, without the weights.
        self.activation = copy.copy(fused)
        self.activation._parameters = {}
        self.activation._is_hf_initialized = True  # so that from_pretrained does not fill the weights that it lost
        self.train(fused.training)

    def _halves(self, fused: tuple[Tensor, Tensor | None], e: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        weight, bias = _of(fused, e)
        middle = len(weight) // 2
        for part in (slice(middle), slice(middle, None)) if self.is_concatenated else (slice(0, None, 2), slice(1, None, 2)):
            yield weight[part], None if bias is None else bias[part]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H]`` tokens, their experts ``[T, k]`` and the experts' shares ``[T, k]``, to ``[T, H]``."""
        out = torch.zeros_like(hidden_states)
        if self.everywhere:
            for e in range(self.num_experts):
                out = out + self._run(e, hidden_states.clone()) / self.num_experts
            return out
        for e in top_k_index.unique().tolist():
            if e < self.num_experts:  # beyond are tokens that another device takes
                token, choice = (top_k_index == e).nonzero(as_tuple=True)
                y = self._run(e, hidden_states[token]) * top_k_weights[token, choice, None]
                out.index_add_(0, token, y.to(out.dtype))
        return out

    def _run(self, e: int, x: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(e))
        if self.has_gate:
            gate, up = expert.gate_proj(x), expert.up_proj(x)
            both = torch.cat([gate, up], -1) if self.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
            y = self.activation._apply_gate(both)
        else:
            y = self.activation.act_fn(expert.up_proj(x))
        result: Tensor = expert.down_proj(y)
        return result


def unfuse(model: nn.Module, *, only: Collection[str] | None = None) -> list[tuple[str, nn.Module]]:
    """Take every fused experts module of ``model`` apart that can be; returns names and originals, for :func:`put_back`.

    Args:
        model: changed in place, its function is not.
        only: names of linears that a checkpoint quantizes: modules that hold one of them are taken apart, without proof (there
            are no weights yet). Otherwise all are that compute the same on random tokens.
    """
    replaced: list[tuple[str, nn.Module]] = []
    try:
        for name, module in list(model.named_modules()):
            if not _is_fused(module):
                continue
            if only is not None and not any(linear.startswith(f"{name}.") for linear in only):
                continue
            stand_in = Experts(module)
            if only is not None or _computes_the_same(stand_in, module):
                replace_module(model, name, stand_in)
                replaced.append((name, module))
            else:
                log.warning("experts %s stay in floating point: taken apart, they would compute something else", name)
    except BaseException:
        put_back(model, replaced)
        raise
    return replaced


def put_back(model: nn.Module, replaced: Sequence[tuple[str, nn.Module]]) -> None:
    """Undo :func:`unfuse`, except where a linear of the stand-in was quantized."""
    for name, original in replaced:
        floats: dict[str, Any] = linears_of(model.get_submodule(name))
        if len(floats) == len(original.down_proj) * (3 if original.has_gate else 2):  # type: ignore[arg-type]
            replace_module(model, name, original)
            continue
        for linear in floats.values():  # a view would keep the weights of all experts in memory
            linear.weight = nn.Parameter(weight_of(linear).clone(), requires_grad=linear.weight.requires_grad)


@contextmanager
def running_everywhere(model: nn.Module) -> Iterator[None]:
    """Inside, every expert sees every token, whatever the router says: a probe must not depend on routes."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Experts):
                module.everywhere = True
                stack.callback(setattr, module, "everywhere", False)
        yield


def _is_fused(module: nn.Module) -> bool:
    facts: Any = module
    if not all(hasattr(facts, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")):
        return False
    names = ("gate_up_proj" if facts.has_gate else "up_proj", "down_proj")
    three = all(isinstance(p := getattr(facts, name, None), nn.Parameter) and p.dim() == 3 for name in names)
    plain = not getattr(facts, "has_post_expert_norm", False) and not getattr(facts, "_is_expert_parallel", False)
    wanted = {*names, *(f"{name}_bias" for name in names if facts.has_bias)}
    return three and plain and {name for name, _ in module.named_parameters()} == wanted and not hasattr(facts, "_hf_hook")


def _rows(fused: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weights ``[E, N, K]`` and biases ``[E, N]`` of one projection of all experts, as views."""
    weight = getattr(fused, name)
    return weight.transpose(1, 2) if fused.is_transposed else weight, getattr(fused, f"{name}_bias") if fused.has_bias else None


def _of(projection: tuple[Tensor, Tensor | None], e: int) -> tuple[Tensor, Tensor | None]:
    weight, bias = projection
    return weight[e], None if bias is None else bias[e]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear


@torch.no_grad()
def _computes_the_same(stand_in: Experts, fused: Any) -> bool:
    random = torch.Generator().manual_seed(0)
    weight, tokens, each = fused.down_proj, 16, min(2, stand_in.num_experts)
    hidden = weight.shape[2] if fused.is_transposed else weight.shape[1]
    x = torch.randn(tokens, hidden, generator=random).to(weight)
    index = torch.stack([torch.randperm(stand_in.num_experts, generator=random)[:each] for _ in range(tokens)]).to(
        weight.device
    )
    share = torch.rand(tokens, each, generator=random).to(weight)
    try:
        wanted, got = fused(x, index, share), stand_in(x, index, share)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # called in another way
    off = (wanted.double() - got.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return wanted.shape == got.shape and float(off) <= 4 * torch.finfo(weight.dtype).eps
