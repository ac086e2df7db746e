"""Models that ``torch.compile`` has wrapped: what is inside is quantized, and meanwhile nothing runs compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])


def is_compiled(module: Any) -> bool:
    """Whether this is the module that ``torch.compile(model)`` returns."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # not loaded: then nothing was compiled
    return eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside, of what ``torch.compile`` returned; anything else as it is."""
    return model.get_submodule("_orig_mod") if is_compiled(model) else model


def eagerly(function: F) -> F:
    """``function(model, ...)``, during which the parts of ``model`` that were compiled run as if they were not.

    So they can be watched and replaced. A model that was not compiled, but compiles functions by itself, goes on doing so.
    """

    @functools.wraps(function)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        parts = model.modules() if isinstance(model, nn.Module) else ()
        if not any(is_compiled(part) or part._compiled_call_impl is not None for part in parts):
            return function(model, *args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return function(model, *args, **kwargs)

    return cast("F", run)
