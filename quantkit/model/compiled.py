"""Models that ``torch.compile`` has wrapped: what is inside is quantized, and meanwhile nothing runs compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_compiled(module: Any) -> bool:
    """Whether this is the module that ``torch.compile(model)`` returns."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # not loaded: then nothing was compiled
    return eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside, of what ``torch.compile`` returned; anything else as it is."""
    return model.get_submodule("_orig_mod") if is_compiled(model) else model


@contextmanager
def eagerly() -> Iterator[None]:
    """While the context is open, whatever was compiled runs as if it was not, so that modules can be watched and replaced."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
