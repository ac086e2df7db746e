"""Running an operand: the door through which layers reach the kernels, with a gradient for what comes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.core.operand import Operand
from quantkit.ops.table import Prepared, choose


def prepare(operand: Operand) -> Prepared:
    """``operand``, made ready by the backend that runs it where it is.

    Raises:
        BackendError: a backend is forced that cannot run it.
    """
    return choose(operand).prepare(operand)


def linear(prepared: Prepared, x: Tensor) -> Tensor:
    """``[M, N]`` of ``x [M, K]``. Gradients flow to ``x`` as if nothing were rounded (straight through)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, prepared)
    return prepared.run(x)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, prepared: Prepared) -> Tensor:
        ctx.operand = prepared.operand
        return prepared.run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.operand.input_gradient(gradient), None
