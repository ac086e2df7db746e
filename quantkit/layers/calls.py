"""Standing between a model and ``torch.nn.functional.scaled_dot_product_attention``.

That function has no module, so nothing can be hooked or replaced in the model itself. torch can call back for every function
that it runs, though: :class:`AttentionCalls` is such a mode. While it is active, each attention call of the model goes to a
function of ours, which may look at the tensors, round them, and call torch's function or one of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from quantkit.core.errors import ModelError
from quantkit.core.tracing import FunctionMode


class AttentionCalls(FunctionMode):
    """A context in which ``answer`` is called in place of ``scaled_dot_product_attention``, with the same arguments.

    Contexts may be nested, since a module that calls attention may contain another one that does. The innermost answers alone:
    while it does, calls of the attention function reach torch.

    Raises:
        ModelError: ``nn.MultiheadAttention`` is run inside, whose attention is a part of one larger function of torch.
    """

    answering = threading.local()

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            raise ModelError(
                "nn.MultiheadAttention keeps its attention to itself, so that it cannot be quantized: leave out -kv and "
                "-attention in the scheme"
            )
        if func is not F.scaled_dot_product_attention or getattr(self.answering, "now", False):
            return func(*args, **(kwargs or {}))
        self.answering.now = True
        try:
            return self.answer(*args, **(kwargs or {}))
        finally:
            self.answering.now = False
