"""The forward of a module whose attention is rounded, kept out of ``torch.compile``.

This file is imported when attention is attached to a model, and not with the package: ``torch.compiler.disable`` imports
``torch._dynamo``, which takes a second. The function is defined at the top of a module so that models can be pickled with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quantkit.layers.calls import AttentionCalls


@torch.compiler.disable(reason="quantkit simulates attention in a mode that watches every function")
def run_with_child(owner: nn.Module, child: str, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``inner(*args, **kwargs)``, during which the submodule of ``owner`` called ``child`` answers attention calls.

    Without such a submodule, because it was removed, ``inner`` runs as it is.
    """
    quantizer = owner._modules.get(child)
    if quantizer is None:
        return inner(*args, **kwargs)
    with AttentionCalls(quantizer):
        return inner(*args, **kwargs)
