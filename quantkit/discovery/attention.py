"""Finding the modules that call attention, by running the model on a batch and watching.

No list of architectures is kept. ``scaled_dot_product_attention`` is a function and not a module, so :func:`watching` records
which modules are running at any moment; when a call comes, the innermost one that is running owns it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.core.errors import ModelError
from quantkit.core.heads import HeadSizes
from quantkit.layers.calls import AttentionCalls
from quantkit.model.modules import call, evaluating


@contextmanager
def watching(model: nn.Module, see: Callable[[str, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """A context in which ``see(name, query, key, value)`` is called before each attention call of ``model``.

    ``name`` is that of the module that owns the call. The model computes what it always does.
    """
    names, running = {module: name for name, module in model.named_modules()}, list[str]()

    def answer(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        see(running[-1], query, key, value)
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def enter(module: nn.Module, args: Any) -> None:
        running.append(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(AttentionCalls(answer))
        yield


def find_attention(model: nn.Module, batch: Any) -> dict[str, HeadSizes]:
    """Run ``model`` on ``batch`` and return the sizes of the attention calls of each module that owns some, by its name.

    Raises:
        ModelError: no module calls ``scaled_dot_product_attention``, or one calls it with different sizes.
    """
    found: dict[str, HeadSizes] = {}

    def see(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        heads = HeadSizes.of(query, key, value)
        known = found.setdefault(name, heads)
        if replace(known, keys=heads.keys) != heads or heads.fault:
            why = heads.fault or "its calls differ in size"
            raise ModelError(
                f"attention of {name or type(model).__name__!r} cannot be quantized: {why} (query {list(query.shape)}, key "
                f"{list(key.shape)}, value {list(value.shape)}); leave out -kv and -attention in the scheme"
            )
        # Different heads may hold equal values in one call by chance, and then count as copies; a later call tells them apart.
        found[name] = replace(heads, keys=math.lcm(known.keys, heads.keys))

    with evaluating(model), watching(model, see):
        call(model, batch)
    if not found:
        raise ModelError(
            f"{type(model).__name__} makes no call of torch.nn.functional.scaled_dot_product_attention that could be seen, so "
            "its attention cannot be quantized: load a transformers model with attn_implementation='sdpa', call that function "
            "in a module of your own, or leave out -kv and -attention in the scheme"
        )
    return found
