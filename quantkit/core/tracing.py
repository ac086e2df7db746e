"""Who else may stand between a call and its result: compilers, tracers, transforms. Imports no compiler."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from quantkit.core.errors import BackendError, ModelError

EMPTY = (
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default, torch.ops.aten.new_empty_strided.default,
)  # fmt: skip
"""Operators that make a tensor and leave its memory as it is."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def constant_while_tracing(function: F) -> F:
    """Mark ``function`` so that Dynamo runs it while it traces, and takes its result for a constant.

    ``torch.compiler.assume_constant_result`` does the same, but it imports ``torch._dynamo`` first. That takes longer than
    importing all of quantkit, also for those who never compile anything.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the attribute that Dynamo looks for
    return function


def not_compiled_alone(function: F) -> F:
    """Have Dynamo compile ``function`` as a part of what calls it, or else leave it and all that it calls to Python.

    Dynamo gives up on a caller whose frame it cannot trace, in this process for good, and goes on with what that one calls.
    What asks whether it is being compiled would then be compiled by itself, and answer yes in a call that nobody else traces.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def in_memory(x: Tensor) -> bool:
    """Whether code may read ``x`` and write results by their addresses, as C and Triton do, and be right.

    Not where ``x`` is of a subclass, such as a fake tensor, or the memory has the negative of its values, and not where
    operators are recorded or replaced: by ``torch.compile``, a dispatch mode, or ``torch.jit.trace``. There an operator has to
    do it, which PyTorch sees as one. Transforms of ``torch.func`` are not looked for, see :func:`in_transform`.
    """
    if is_dynamo_compiling():  # which cannot trace the calls into C
        return False
    return type(x) is Tensor and not _len_torch_dispatch_stack() and _get_tracing_state() is None and not x.is_neg()


def demand_memory(x: Tensor) -> None:
    """Raise a ModelError if ``x`` should have memory and has none, as after its storage was freed: reads would be fatal."""
    if not x.data_ptr() and x.numel() and not x.is_meta:
        raise ModelError(
            f"an INT8 layer has or was given a tensor of {list(x.shape)} without memory: its storage was given back"
        )


class FunctionMode(TorchFunctionMode):
    """A mode that an interruption passes through.

    PyTorch takes modes off its stack for a moment whenever it calls one. If Ctrl-C comes right then, leaving a mode is an error
    of its own, which would hide the interruption.
    """

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            super().__exit__(kind, error, trace)
        except RuntimeError:
            if kind is None or issubclass(kind, Exception):
                raise


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is at work (``grad``, ``vmap``, ``jvp`` and those made of them)."""
    return not is_dynamo_compiling() and peek_interpreter_stack() is not None


def apart(weight: Tensor, function: Callable[..., T], *args: Any) -> T:
    """What ``function`` makes of ``weight`` and other tensors for later calls too, as if nothing stood around it.

    Modes, transforms and tracers belong to a thread, so where there are any, another thread does it. A weight that is itself
    of theirs, such as a fake tensor, is left to them.

    Raises:
        BackendError: a transform of ``torch.func`` has taken the weight.
    """
    if is_dynamo_compiling() or type(weight) is not Tensor or (in_memory(weight) and not in_transform()):
        return function(*args)
    if is_functorch_wrapped_tensor(weight):
        raise BackendError(
            "torch.func cannot transform the weight of an INT8 layer, which is made of integers: leave its buffers out of what "
            "functional_call or stack_module_state passes on, and transform the input only"
        )
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, function, *args).result()
