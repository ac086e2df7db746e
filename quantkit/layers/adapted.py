"""INT8 layers under adapters, such as those of PEFT: whoever looks at their weight finds floats, and may not write there.

An adapter calls the layer that it is put around, and this needs nothing. Many also read its ``weight``, though: DoRA at every
call, others to begin with a part of it, and all of them when they are merged. Codes would be taken for values there. So while a
layer is under an adapter, its ``weight`` is a tensor of the floats that the codes stand for, made when they are needed. What is
written there could not be kept in codes, and an error says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantkit.core.errors import ModelError
from quantkit.layers.linear import W8A8Linear
from quantkit.model.adapters import has_adapter
from quantkit.model.modules import is_conv1d

READ_ONLY = (
    "the weight of an INT8 layer cannot be written to, as merging an adapter does, or starting one from a part of the weight. "
    "Make the layers floating point first: model.dequantize() of transformers, or W8A8Linear.to_float() for each layer"
)


class ReadOnly(Tensor):
    """A tensor that is made when its values are needed, and refuses to be written to; so do views of it."""

    _values: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, values: Callable[[], Tensor], shape: Any, **kind: Any) -> Self:
        """A tensor of this shape, dtype, device and strides, with the values that ``values()`` returns."""
        self: Self = torch.Tensor._make_wrapper_subclass(cls, shape, **kind)
        self._values = values
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__ and isinstance(args[0], cls):  # type: ignore[attr-defined]
            raise ModelError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        shared = {a.name for a in func._schema.arguments if a.alias_info and isinstance(given.get(a.name), cls)}
        if shared and func._schema.is_mutable:
            raise ModelError(READ_ONLY)
        if func is torch.ops.aten.detach.default:
            return _like(args[0], args[0]._values)
        result = func(*tree_map(_made, args), **tree_map(_made, kwargs or {}))
        return tree_map(lambda y: _like(y, lambda: y) if isinstance(y, Tensor) else y, result) if shared else result

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self._values())


def _like(tensor: Tensor, values: Callable[[], Tensor]) -> ReadOnly:
    return ReadOnly(values, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _made(value: Any) -> Any:
    return value._values() if isinstance(value, ReadOnly) else value


class AdaptedLinear(W8A8Linear):
    """A :class:`W8A8Linear` under an adapter. It is the same object that it was before, and will be a W8A8Linear again after.

    Attributes:
        weight: ``[N, K]`` float32, the matrix by which the input is multiplied, but for the rounding of the input. Read-only.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        operand = self.operand
        shape = (operand.out_features, operand.in_features)
        return ReadOnly(operand.matrix, shape, dtype=torch.float32, device=operand.device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and value.dtype != self._buffers["weight"].dtype:  # type: ignore[union-attr]
            raise ModelError(READ_ONLY)
        super().__setattr__(name, value)


@functools.cache
def _watch() -> None:
    nn.modules.module.register_module_module_registration_hook(_registered)


def watch_adapters(model: nn.Module) -> None:
    """From now on, INT8 layers become :class:`AdaptedLinear` where an adapter is put around them, and back.

    Called with every model that gets a report, since torch tells of such things for all modules of a process at once, and a
    process without an INT8 model has no use for that.
    """
    _watch()


def _registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """A hook of torch: ``child`` becomes ``parent``'s child called ``name``."""
    int8 = type(child) in (W8A8Linear, AdaptedLinear)
    if child is None or not (int8 or name == "base_layer"):
        return
    adapted, anew = has_adapter(parent), name not in parent._modules
    if int8 and adapted and anew and name == "original_module":
        raise ModelError(
            "modules_to_save names an INT8 layer, and a copy of it has nothing to train: leave the layer in floating point by "
            "ignore=[...] of quantkit.quantize(), or put an adapter around it"
        )
    if int8:
        child.__class__ = AdaptedLinear if adapted else W8A8Linear
    for module in parent.modules() if adapted and not anew and name == "base_layer" else ():
        if isinstance(getattr(module, "fan_in_fan_out", None), bool):
            setattr(module, "fan_in_fan_out", is_conv1d(child))  # noqa: B010 - whether the weight of the base is transposed
