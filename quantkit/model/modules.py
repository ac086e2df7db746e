"""Looking at trees of ``nn.Module``: what counts as a linear, what its weight is, how a model is called, what it returns."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import CalibrationError


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the ``Conv1D`` of transformers (GPT-2): a linear that stores its weight transposed, as ``[K, N]``."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # not loaded: then there is no Conv1D to find
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes ``x W^T + b`` and nothing else, so that a W8A8Linear can take its place.

    A subclass of ``nn.Linear`` with a forward of its own, such as Falcon's, may compute more. It is run on a small input, and
    counts if it gives what a plain linear gives.
    """
    if is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads the weight of the latter without calling it
    if "parametrizations" in module._modules or not module.weight.is_floating_point():
        return False  # what would be written to its weight is recomputed, or it is quantized by someone else
    return type(module).forward is nn.Linear.forward or _multiplies(module)


def _multiplies(module: nn.Linear) -> bool:
    if any(module.children()) or module.weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=torch.float32, device="cpu").view(2, -1).to(module.weight)
    with torch.no_grad():
        wanted, got = nn.functional.linear(x, module.weight, module.bias), type(module).forward(module, x)
    return isinstance(got, Tensor) and got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-2, atol=1e-4)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear as ``[N, K]``: a detached view, so that writing to it changes the linear."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module for every linear, in the order of registration. A linear with several names is listed once."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def applied_but_float32(module: nn.Module, fn: Any, names: Collection[str]) -> None:
    """``Module._apply``, which ``.to()``, ``.half()`` and the like call, except that some buffers keep their dtype.

    The buffers of ``module`` called ``names`` that are float32 move to another device with the rest, and stay float32.
    """
    before = {n: b for n, b in module.named_buffers() if b.dtype == torch.float32 and n in names}
    nn.Module._apply(module, fn)
    for name, buffer in before.items():
        after = getattr(module, name)
        if after.dtype != buffer.dtype:
            setattr(module, name, buffer.to(after.device))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module called ``name``, at every place of the model where that is registered."""
    old = model.get_submodule(name)
    for parent in model.modules():
        for child, module in parent.named_children():
            if module is old:
                setattr(parent, child, new)
                if getattr(parent, "activation_relu_or_gelu", 0):
                    # torch's encoder layer would go on reading the weights of its linears in a fused float kernel
                    parent.activation_relu_or_gelu = 0  # type: ignore[assignment]


def call(model: nn.Module, batch: Any) -> Any:
    """Run the model on one batch: a tensor, a mapping of keyword arguments, or a tuple or list of arguments.

    Models that would return a cache of keys and values are told not to.

    Raises:
        CalibrationError: the batch is of another type.
    """
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if isinstance(batch, Tensor):
        return model(batch, **extra)
    if isinstance(batch, Mapping):
        return model(**{**batch, **extra})
    if isinstance(batch, (tuple, list)):
        return model(*batch, **extra)
    raise CalibrationError(
        f"a calibration batch is a {type(batch).__name__}: pass tensors, dicts of keyword arguments or tuples of arguments"
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in nested tuples, lists, mappings and dataclasses. Caches and other objects are left out."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "past_key_values":
                yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        yield from tensors_in(vars(value))


def all_tensors(value: Any) -> list[Tensor]:
    """Every tensor, of any dtype, in nested tuples, lists and mappings."""
    found: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, take)
    return found


def memory_of(tensor: Tensor) -> Any:
    """The bytes of a tensor as an object with the buffer protocol, for a file or a hash; nothing is copied.

    The tensor has to be contiguous, in main memory and not empty, and to live as long as the bytes are used.
    """
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def map_tensors(value: Any, function: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a named tuple takes them one by one
    return value


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a linear was called on, by position or by name."""
    x = args[0] if args else kwargs.get("input", kwargs.get("x"))
    assert isinstance(x, Tensor)
    return x


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While the context is open, the model is in eval mode and computes no gradients; then each module's flag is restored."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
