"""Mixtures of experts whose weights are one parameter with three dimensions, taken apart into linears.

transformers 5 stores the weights of all experts of a block as ``[E, N, K]`` and multiplies by slices of it. There is no
``nn.Linear`` to find, to probe or to quantize. So :class:`Experts` stands in for such a module while a model is quantized: it
has a linear for each projection of each expert. Their weights are views of the original parameter, so that nothing is copied,
and putting the original module back undoes everything.

A stand-in is used only if it computes the same as the original on random tokens with random routes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.model.adapters import Adapters
from quantkit.model.modules import linears_of, replace_module, weight_of

log = logging.getLogger("quantkit")
UNSAID = {"has_gate": True, "has_bias": False, "is_transposed": True, "is_concatenated": True}
"""What modules of fused experts say of themselves, and what is assumed of those that do not, until it is proven."""


class Experts(nn.Module):
    """A module of experts with linears called ``0.gate_proj``, ``0.up_proj``, ``0.down_proj``, ``1.gate_proj`` and so on.

    Experts run one after the other, and only those that some token is routed to.

    Args:
        fused: the module to stand in for, of a class that transformers decorates with ``use_experts_implementation``, or one
            with the same parameters, see :class:`SortedExperts`.

    Attributes:
        everywhere: while it is set, every expert sees every token, see :func:`running_everywhere`.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.num_experts, self.has_gate = len(fused.down_proj), _fact(fused, "has_gate")
        self.is_concatenated = _fact(fused, "is_concatenated")
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
        # How gate and up are joined is the family's own affair: a copy of its module, without the weights, does it.
        self.activation = copy.copy(fused)
        self.activation._parameters = {}
        self.activation._is_hf_initialized = True  # so that from_pretrained does not fill the weights that it lost
        self.train(fused.training)

    def _halves(self, fused: tuple[Tensor, Tensor | None], e: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the gate and then of the up projection of expert ``e``, as views of the fused ones."""
        weight, bias = _of(fused, e)
        middle = len(weight) // 2
        for part in (slice(middle), slice(middle, None)) if self.is_concatenated else (slice(0, None, 2), slice(1, None, 2)):
            yield weight[part], None if bias is None else bias[part]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of what each token's experts compute, ``[T, H]`` in the dtype of ``hidden_states``.

        Args:
            hidden_states: ``[T, H]``, the tokens.
            top_k_index: ``[T, k]`` int64, the experts of each token.
            top_k_weights: ``[T, k]``, by what their outputs are multiplied.
        """
        out = torch.zeros_like(hidden_states)
        if self.everywhere:
            for e in range(self.num_experts):
                out = out + self._run(e, hidden_states.clone()) / self.num_experts
            return out
        for e in top_k_index.unique().tolist():
            if e < self.num_experts:  # larger numbers stand for experts of other devices
                token, choice = (top_k_index == e).nonzero(as_tuple=True)
                y = self._run(e, hidden_states[token]) * top_k_weights[token, choice, None]
                out.index_add_(0, token, y.to(out.dtype))
        return out

    def _run(self, e: int, x: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(e))
        y = self._gated(expert.gate_proj(x), expert.up_proj(x)) if self.has_gate else self.activation.act_fn(expert.up_proj(x))
        result: Tensor = expert.down_proj(y)
        return result

    def _gated(self, gate: Tensor, up: Tensor) -> Any:
        both = torch.cat([gate, up], -1) if self.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        return self.activation._apply_gate(both)


class SortedExperts(Experts):
    """Experts that get as many tokens each, one expert after the other, as those of Llama 4 do: zeros for whom it is not."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """What each expert computes of its tokens, ``[E * T, H]`` of ``hidden_states [E * T, H]``."""
        parts = hidden_states.chunk(self.num_experts)
        return torch.cat([self._run(e, part) for e, part in enumerate(parts)])

    def _gated(self, gate: Tensor, up: Tensor) -> Any:
        return up * self.activation.act_fn(gate)


def unfuse(model: nn.Module, *, only: Collection[str] | None = None) -> list[tuple[str, nn.Module]]:
    """Put an :class:`Experts` in the place of every module of fused experts in ``model``, wherever it computes the same.

    Args:
        model: changed in place; its function stays.
        only: names of the linears that a checkpoint holds as quantized. If given, modules are replaced that contain one of
            them, and no others, and without proof, since there are no weights yet.

    Returns:
        Pairs of the name and the original module, for :func:`put_back`.
    """
    replaced: list[tuple[str, nn.Module]] = []
    adapted = Adapters.of(model).reach
    try:
        for name, module in list(model.named_modules()):
            if not is_fused(module) or name in adapted:  # an adapter would look for the parameters of the original
                continue
            if only is not None and not any(linear.startswith(f"{name}.") for linear in only):
                continue
            stand_in = (Experts if hasattr(module, "_apply_gate") else SortedExperts)(module)
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
    """Put the original modules back that :func:`unfuse` returned, except where a linear of the stand-in was quantized."""
    for name, original in replaced:
        floats: dict[str, Any] = linears_of(model.get_submodule(name))
        if len(floats) == len(original.down_proj) * (3 if _fact(original, "has_gate") else 2):  # type: ignore[arg-type]
            replace_module(model, name, original)
            continue
        for linear in floats.values():  # as views they would keep the weights of all experts in memory
            linear.weight = nn.Parameter(weight_of(linear).clone(), requires_grad=linear.weight.requires_grad)


@contextmanager
def running_everywhere(model: nn.Module) -> Iterator[None]:
    """While the context is open, every expert sees every token, whatever the router says.

    The probe needs this: its answers must not depend on where made-up values happen to be routed.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Experts):
                module.everywhere = True
                stack.callback(setattr, module, "everywhere", False)
        yield


def is_fused(module: nn.Module) -> bool:
    """Whether this is a module of fused experts with parameters that :class:`Experts` knows, and no others."""
    facts: Any = module
    if len({hasattr(facts, name) for name in (*UNSAID, "_apply_gate")}) > 1:  # some, and not all
        return False
    names = ("gate_up_proj" if _fact(facts, "has_gate") else "up_proj", "down_proj")
    three = all(isinstance(p := getattr(facts, name, None), nn.Parameter) and p.dim() == 3 for name in names)
    plain = not getattr(facts, "has_post_expert_norm", False) and not getattr(facts, "_is_expert_parallel", False)
    wanted = {*names, *(f"{name}_bias" for name in names if _fact(facts, "has_bias"))}
    return three and plain and {name for name, _ in module.named_parameters()} == wanted and not hasattr(facts, "_hf_hook")


def _fact(fused: Any, name: str) -> bool:
    return bool(getattr(fused, name, UNSAID[name]))


def _rows(fused: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Weights ``[E, N, K]`` and biases ``[E, N]`` of one projection of all experts, as views."""
    weight, bias = getattr(fused, name), getattr(fused, f"{name}_bias") if _fact(fused, "has_bias") else None
    return weight.transpose(1, 2) if _fact(fused, "is_transposed") else weight, bias


def _of(projection: tuple[Tensor, Tensor | None], e: int) -> tuple[Tensor, Tensor | None]:
    """Weight ``[N, K]`` and bias ``[N]`` of expert ``e``."""
    weight, bias = projection
    return weight[e], None if bias is None else bias[e]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear with exactly these tensors, which are not copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear


@torch.no_grad()
def _computes_the_same(stand_in: Experts, fused: Any) -> bool:
    """Whether both give the same, to a few roundings, for sixteen random tokens with up to two random experts each."""
    random = torch.Generator().manual_seed(0)
    is_sorted = isinstance(stand_in, SortedExperts)
    weight, tokens, each = fused.down_proj, 16 * (stand_in.num_experts if is_sorted else 1), min(2, stand_in.num_experts)
    hidden = weight.shape[2] if _fact(fused, "is_transposed") else weight.shape[1]
    x = torch.randn(tokens, hidden, generator=random, dtype=torch.float32, device="cpu").to(weight)
    index = torch.stack(
        [torch.randperm(stand_in.num_experts, generator=random, dtype=torch.int64, device="cpu")[:each] for _ in range(tokens)]
    ).to(weight.device)
    share = torch.rand(tokens, each, generator=random, dtype=torch.float32, device="cpu").to(weight)
    try:
        args = (x,) if is_sorted else (x, index, share)
        wanted, got = fused(*args), stand_in(*args)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return False  # the original takes other arguments
    off = (wanted.double() - got.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return wanted.shape == got.shape and float(off) <= 4 * torch.finfo(weight.dtype).eps
