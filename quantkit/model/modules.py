"""Looking at trees of ``nn.Module``: what counts as a linear, what its weight is, how a model is called, what it returns."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import CalibrationError
from quantkit.model.compiled import is_compiled
from quantkit.model.nested import without_fast_path
from quantkit.model.trial import fault_of

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What a weight may be made of to be quantized. Shorter formats are quantized already."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the ``Conv1D`` of transformers (GPT-2): a linear that stores its weight transposed, as ``[K, N]``."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # not loaded: then there is no Conv1D to find
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes ``x W^T + b`` and nothing else, so that a W8A8Linear can take its place.

    A subclass of ``nn.Linear`` with a forward of its own, such as Falcon's, may compute more, and is tried (:mod:`.trial`).
    """
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and why_no_linear(module) is None


def why_no_linear(module: nn.Module) -> str | None:
    """Why a module that looks like a linear is none for quantkit; None if it is one."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention multiplies by its in_proj_weight itself"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"{kind.__module__}.{kind.__qualname__} is no nn.Linear"
    computed = [name for name in ("weight", "bias") if name not in module._parameters]
    if computed:
        return f"{kind.__name__} whose {' and '.join(computed)} is no parameter, but computed from others"
    more = [*module._parameters.keys() - {"weight", "bias"}, *module._buffers, *module._modules]
    if more:
        return f"{kind.__name__} has {', '.join(sorted(more))} beside weight and bias"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATS or weight.layout is not torch.strided:
        how = f"{type(weight).__name__} of {weight.dtype}" + ("" if weight.layout is torch.strided else f", {weight.layout}")
        return f"{kind.__name__} whose weight is a {how}, which is nothing to round"
    if kind.__call__ is not nn.Module.__call__:
        return f"{kind.__name__} has a __call__ of its own"
    if _has_own_forward(module):
        return f"{kind.__name__} with a forward put on the module, which may compute something else"
    return None if kind.forward is nn.Linear.forward or is_conv1d(module) else fault_of(module)  # type: ignore[arg-type]


def _has_own_forward(module: Any) -> bool:
    """Whether a forward was put on the module itself, other than by accelerate to move inputs to its device."""
    own = vars(module).get("forward")
    hooks, hook = sys.modules.get("accelerate.hooks"), vars(module).get("_hf_hook")
    if hooks is not None and hook is not None:
        moves = all(type(h) is hooks.AlignDevicesHook for h in getattr(hook, "hooks", [hook]))
        if moves and getattr(getattr(own, "func", None), "__module__", None) == hooks.__name__:
            own = module._old_forward
    is_its_own = getattr(own, "__func__", None) is type(module).forward and own.__self__ is module
    return own is not None and not is_its_own


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear as ``[N, K]``: a detached view, so that writing to it changes the linear."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def linears_of(model: nn.Module, *, untried: bool = False) -> dict[str, nn.Module]:
    """Name -> module for every linear, in the order of registration. A linear with several names is listed once.

    Args:
        model: any module.
        untried: also list subclasses of ``nn.Linear`` that have no weights yet with which they could be tried. Whoever made a
            checkpoint has tried them.
    """

    def no_weights(module: nn.Module) -> bool:
        return untried and isinstance(module, nn.Linear) and "weight" in module._parameters and module.weight.is_meta

    return {name: module for name, module in model.named_modules() if is_linear(module) or no_weights(module)}


def lookalikes_of(model: nn.Module) -> dict[str, str]:
    """Name of every module that looks like a linear and is none -> the reason: it has the sizes of one, or is of its class."""
    kinds = (nn.Linear, nn.MultiheadAttention)

    def looks(module: Any) -> bool:
        if isinstance(module, kinds) or is_conv1d(module):
            return True
        sizes = (vars(module).get("in_features"), vars(module).get("out_features"))
        return all(isinstance(size, int) for size in sizes) and not any(isinstance(m, kinds) for m in module.modules())

    found = {name: why_no_linear(module) for name, module in model.named_modules() if looks(module)}
    return {name: reason for name, reason in found.items() if reason is not None}


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


Parents = dict[nn.Module, list[nn.Module]]


def parents_of(model: nn.Module) -> Parents:
    """Each module of ``model`` -> the modules that it is registered in."""
    found: Parents = {}
    for parent in model.modules():
        for module in parent._modules.values():  # children() leaves out second names
            if module is not None:
                found.setdefault(module, []).append(parent)
    return found


def replace_module(model: nn.Module, name: str, new: nn.Module, parents: Parents | None = None) -> None:
    """Put ``new`` in the place of the module called ``name``, at every place of the model where that is registered.

    Hooks that were put on the old module run on the new one from then on, and find there the attributes that were given to a
    linear.

    Args:
        parents: :func:`parents_of` of the model, and kept so. Whoever replaces thousands of modules walks through the model
            only once with it.
    """
    old = model.get_submodule(name)
    _share_hooks(old, new)
    if isinstance(new, nn.Linear):
        given = {key: value for key, value in vars(old).items() if not key.startswith("_") and key != "forward"}
        vars(new).update(given | vars(new))
    places = (parents_of(model) if parents is None else parents).pop(old, [])
    if parents is not None:
        parents[new] = places
    for parent in places:
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)
                if is_compiled(parent):
                    parent._initialize()  # type: ignore[operator]  # or it would go on calling the old one
                if isinstance(parent, nn.TransformerEncoderLayer):
                    without_fast_path(parent)


def all_names(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Each of ``names`` -> all names of the module called so, which may be registered at several places of the model."""
    by_module: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_module.setdefault(module, []).append(name)
    return {name: by_module[model.get_submodule(name)] for name in names}


def _share_hooks(old: Any, new: Any) -> None:
    """Let ``new`` have the very dictionaries of hooks that ``old`` has, since the handles that remove hooks know these.

    Hooks that run before a state is loaded stay behind: each refers to the module that it was made for.
    """
    for key in vars(nn.Module()):
        if "hook" in key and key != "_load_state_dict_pre_hooks":
            vars(new)[key] = vars(old)[key]
    if "_hf_hook" in vars(old) and "_hf_hook" not in vars(new):
        sys.modules["accelerate.hooks"].add_hook_to_module(new, old._hf_hook)


def call(model: nn.Module, batch: Any) -> Any:
    """Run the model on a copy of one batch: a tensor, a mapping of keyword arguments, or a tuple or list of arguments.

    A batch is run many times, so what the model does to it in place must not last. Models that would return a cache of keys
    and values are told not to.

    Raises:
        CalibrationError: the batch is of another type, or is not what the forward of the model takes.
    """
    args, kwargs = arguments(model, batch)
    return model(*args, **kwargs)


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which ``model`` is called on a copy of ``batch``.

    Raises:
        CalibrationError: as :func:`call`.
    """
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise CalibrationError(
            f"a calibration batch is a {type(batch).__name__}: pass tensors, dicts of keyword arguments or tuples of arguments"
        )
    own, signature = _copied(batch), inspect.signature(model.forward)
    args = () if isinstance(own, Mapping) else (own,) if isinstance(own, Tensor) else tuple(own)
    kwargs = dict(own) if isinstance(own, Mapping) else {}
    if "use_cache" in signature.parameters:
        kwargs["use_cache"] = False
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        holds = f"a dict of {', '.join(map(str, own))}" if isinstance(own, Mapping) else f"{len(args)} arguments"
        raise CalibrationError(
            f"a calibration batch is {holds}, and {type(model).__name__}.forward takes ({', '.join(signature.parameters)}): "
            f"{error}; pass its inputs only, without labels or targets, such as calibration=[x for x, y in loader]"
        ) from None
    return args, kwargs


def _copied(batch: Any) -> Any:
    """A copy of a batch, with caches and all else that is in it. Tensors that are one stay one."""
    clones = {id(tensor): tensor.detach().clone() for tensor in all_tensors(batch)}
    try:
        return copy.deepcopy(batch, clones)
    except Exception:  # noqa: BLE001  it holds an object that cannot be copied, such as a lock
        return map_tensors(batch, lambda tensor: clones[id(tensor)])


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
    """While the context is open, the model is in eval mode and computes no gradients; then each module's flag is restored.

    Nor does ``nn.TransformerEncoder`` make nested tensors of padded ones, which only the fast path of its layers can read. A
    layer with a hook inside does not take it.
    """
    flags = {module: module.training for module in model.modules()}
    nests: list[Any] = [module for module in flags if getattr(module, "use_nested_tensor", False)]
    model.eval()
    for module in nests:
        module.use_nested_tensor = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        for module in nests:
            module.use_nested_tensor = True
