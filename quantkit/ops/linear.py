"""Running an operand: the door through which layers reach the kernels, with a gradient for what comes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.jit._trace import is_tracing

from quantkit.core.operand import Operand
from quantkit.core.tracing import in_memory, not_compiled_alone
from quantkit.core.validity import check_indices
from quantkit.ops.table import Prepared, choose


def prepare(operand: Operand) -> Prepared:
    """``operand``, made ready by the backend that runs it where it is.

    Raises:
        BackendError: a backend is forced that cannot run it.
        ModelError: it has indices of channels that point outside of it.
    """
    check_indices(operand)
    return choose(operand).prepare(operand)


@not_compiled_alone
def linear(prepared: Prepared, x: Tensor) -> Tensor:
    """``[..., N]`` of ``x [..., K]``. Gradients flow to ``x`` as if nothing were rounded (straight through).

    What a backend has prepared may have an attribute ``again``, which is called first: it takes x as it is, and gives the
    result, or None where it would not be quicker than ``run``.
    """
    # not in_transform(): a call costs a tenth of a microsecond
    if (not is_dynamo_compiling() and peek_interpreter_stack() is not None) or forward_ad._current_level >= 0:
        run: Any = _Transformed.apply
    elif x.requires_grad and torch.is_grad_enabled() and not is_tracing():  # which records no functions of autograd
        run = _StraightThrough.apply
    else:
        if in_memory(x) and (again := getattr(prepared, "again", None)) and (y := again(x)) is not None:
            return y
        run = None
    rows = x.reshape(-1, prepared.operand.in_features)
    y = prepared.run(rows) if run is None else run(rows, prepared)
    return y.view(*x.shape[:-1], prepared.operand.out_features)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, prepared: Prepared) -> Tensor:
        return prepared.run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Prepared], output: Tensor) -> None:
        ctx.operand = inputs[1].operand

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.operand.input_gradient(gradient), None


class _Transformed(_StraightThrough):
    """The same with rules for ``torch.func``. Dynamo takes no function that has them."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        operand = ctx.operand
        whole = torch.eye(operand.out_features, dtype=torch.float32, device=operand.device)
        return (tangent.float() @ operand.input_gradient(whole).t()).to(tangent.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, prepared: Prepared) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        if prepared.operand.rewrite.threshold is not None:  # for which it matters what else is in a batch
            return torch.stack([linear(prepared, batch) for batch in x]), 0
        return linear(prepared, x.flatten(0, 1)).unflatten(0, x.shape[:2]), 0
