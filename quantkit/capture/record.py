"""What a CUDA graph is on a GPU, for a CPU: the operators that a function called, played again on the same memory.

A function is run once while everything that reaches PyTorch is noted, with the tensors that it read and wrote. These stay
where they are, so that playing the notes writes new results over the old ones. Views need no playing, nor does what depends on
nothing that can change. Most of the rest becomes a list for C (:mod:`quantkit.ops.cpu.program`); what C does not know calls
PyTorch again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from quantkit.core.tracing import FunctionMode
from quantkit.layers.linear import W8A8Linear
from quantkit.ops.cpu.native import library
from quantkit.ops.cpu.program import Program, attends, lowered, lowered_layer


class CaptureError(Exception):
    """A function cannot be captured; the message is the reason."""


class Call(NamedTuple):
    """One operator or INT8 layer that was called, on what, and what came out."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    @property
    def read(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def written(self) -> list[Tensor]:
        """What it changes in place."""
        return _tensors(written_by(self.function, self.args, self.kwargs))

    @property
    def is_view(self) -> bool:
        """Whether its results lie in the memory of what it read."""
        memory = {_memory(t) for t in self.read}
        out = _tensors(self.out)
        return not self.written and bool(out) and all(_memory(t) in memory for t in out)


def written_by(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Those of the arguments that ``function`` changes in place."""
    schema = getattr(function, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
    return [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def by_values(function: Any, args: Sequence[Any]) -> bool:
    """Whether what an operator gives to Python, or the sizes of its results, depend on values of tensors."""
    if function is torch.ops.aten.index.Tensor:  # where it is numbers that choose, their values do not matter
        return any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None)
    return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags


def in_parts(mode: TorchDispatchMode, function: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator by those that it consists of, which inference mode keeps from modes; NotImplemented if none."""
    if not torch.is_inference_mode_enabled():
        return NotImplemented
    with mode:
        return function.decompose(*args, **kwargs)


class Reading(FunctionMode):
    """Tells of functions that give values of tensors to Python without asking any operator.

    Args:
        told: called with what was read.
    """

    def __init__(self, told: Callable[[str], None]) -> None:
        super().__init__()
        self._told = told

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READERS or (
            func in SPLITTERS and any(isinstance(leaf, Tensor) for leaf in (*args[1:], *(kwargs or {}).values()))
        ):
            self._told(f"it decides by values of tensors ({getattr(func, '__name__', func)})")
        return func(*args, **(kwargs or {}))


READERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
SPLITTERS = (torch.tensor_split, Tensor.tensor_split)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Notes what is called while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if by_values(func, args):
            raise CaptureError(f"it decides by values of tensors ({func})")
        out = in_parts(self, func, args, kwargs or {})
        if out is NotImplemented:
            out = func(*args, **(kwargs or {}))
            self.calls.append(Call(func, args, kwargs or {}, out))
        return out

    @contextmanager
    def layers_as_one(self, model: nn.Module) -> Iterator[None]:
        """While the context is open, an INT8 layer of ``model`` is one call."""
        layers = plain_layers(model)

        def stand_in(layer: W8A8Linear) -> Callable[[Tensor], Tensor]:
            def forward(input: Tensor) -> Tensor:
                with _disable_current_modes():
                    out = W8A8Linear.forward(layer, input)
                self.calls.append(Call(layer, (input,), {}, out))
                return out

            return forward

        with own_forwards({layer: stand_in(layer) for layer in layers}):
            yield


def plain_layers(model: nn.Module) -> list[W8A8Linear]:
    """INT8 layers whose ``forward`` is our own."""
    layers = {id(m): m for m in model.modules() if isinstance(m, W8A8Linear)}.values()
    return [m for m in layers if "forward" not in vars(m) and type(m).forward is W8A8Linear.forward]


@contextmanager
def own_forwards(forwards: dict[W8A8Linear, Any]) -> Iterator[None]:
    for layer, forward in forwards.items():
        layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in forwards:
            layer.__dict__.pop("forward", None)


class Recording:
    """The calls of a function, to be played again.

    Attributes:
        outputs: what the function returned; playing writes into it.
        said: how many operators C runs, and which go through PyTorch, how often.
    """

    def __init__(self, calls: list[Call], outputs: Any) -> None:
        self.outputs = outputs
        slow: Counter[str] = Counter()
        self._parts: list[Program | Callable[[], None]] = []
        native = library() is not None
        calls = _worth_playing(calls)
        for call in _unrepeated(calls, {_memory(t) for t in _tensors(outputs)}) if native else calls:
            program = self._parts[-1] if self._parts and isinstance(self._parts[-1], Program) else Program()
            if native and _lowered(program, call):
                if not self._parts or self._parts[-1] is not program:
                    self._parts.append(program)
                continue
            slow["INT8 layers" if isinstance(call.function, nn.Module) else str(call.function)] += 1
            self._parts.append(_again(call))
        count = sum(len(part.list) for part in self._parts if isinstance(part, Program))
        rest = ", ".join(f"{name} ({n})" for name, n in slow.most_common())
        self.said = f"{count:,} operations in C" + (f"; through PyTorch: {rest}" if rest else "")

    @torch.no_grad()
    def play(self) -> None:
        """Do it again on what the tensors hold now."""
        threads = torch.get_num_threads()
        for part in self._parts:
            if isinstance(part, Program):
                part.run(threads)
            else:
                part()


def record(function: Callable[[], Any], model: nn.Module) -> Recording:
    """Run ``function`` once, and keep what it did.

    Args:
        function: reads and writes only tensors that stay where they are.
        model: whose INT8 layers it calls.

    Raises:
        CaptureError: what it does depends on values of tensors, or on random numbers.
    """
    recorder, random, read = Recorder(), torch.get_rng_state(), list[str]()
    with torch.no_grad(), recorder.layers_as_one(model), Reading(read.append), recorder:
        outputs = function()
    if read:
        raise CaptureError(read[0])
    if not torch.equal(random, torch.get_rng_state()):
        raise CaptureError("it draws random numbers")
    return Recording(recorder.calls, outputs)


def _worth_playing(calls: list[Call]) -> list[Call]:
    """The calls without views, and without those whose result can never change."""
    changed = {_memory(t) for call in calls for t in call.written}
    fixed: set[int] = set()
    found = []
    for call in calls:
        if call.is_view:
            continue
        out = _tensors(call.out)
        memory = {_memory(t) for t in out}
        constant = not call.written and not isinstance(call.function, nn.Module) and memory.isdisjoint(changed)
        if constant and out and all(_memory(t) in fixed for t in call.read):
            fixed |= memory
        else:
            found.append(call)
    return found


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def _unrepeated(calls: list[Call], kept: set[int]) -> list[Call]:
    """The calls, with attention that reads keys and values where they are, and not copies of them for each query of a group.

    Args:
        calls: without views.
        kept: memory that has to hold what it held in any case.
    """
    copies = {_memory(call.out): i for i, call in enumerate(calls) if call.function is torch.ops.aten.clone.default}
    calls, spared = list(calls), set[int]()
    for at, call in enumerate(calls):
        if call.function is not ATTENTION:
            continue
        q, keys, values = call.args[:3]
        k, v = (_before_copy(calls, copies.get(_memory(heads)), at, heads) for heads in (keys, values))
        if k is None or v is None or not attends(q, k, v, *call.args[3:], **call.kwargs):
            continue
        calls[at] = call._replace(args=(q, k, v, *call.args[3:]))
        spared |= {_memory(keys), _memory(values)}
    spared -= kept | {_memory(t) for call in calls for t in call.read}
    gone = {copies[memory] for memory in spared}
    return [call for at, call in enumerate(calls) if at not in gone]


def _before_copy(calls: list[Call], copied: int | None, reader: int, heads: Tensor) -> Tensor | None:
    """``[B, KV, S, D]`` of which ``heads [B, KV G, S, D]``, made by one call and read by another, has each head G times."""
    if copied is None:
        return None
    source, copy = calls[copied].args[0], calls[copied].out
    if source.dim() != 5 or source.stride(2) or heads.shape != copy.flatten(1, 2).shape:
        return None
    if not copy.is_contiguous() or not heads.is_contiguous() or heads.data_ptr() != copy.data_ptr():
        return None
    changed = {_memory(t) for call in calls[copied + 1 : reader] for t in call.written}
    return None if changed & {_memory(source), _memory(copy)} else source[:, :, 0]


def _lowered(program: Program, call: Call) -> bool:
    if isinstance(call.function, W8A8Linear):
        x = call.args[0]
        return x.is_contiguous() and lowered_layer(program, call.function.prepared, x, call.out)
    return lowered(program, call.function, call.args, call.kwargs, call.out)


def _again(call: Call) -> Callable[[], None]:
    function, args, kwargs, old = call
    if call.written:
        return lambda: function(*args, **kwargs)
    targets = _tensors(old)

    def play() -> None:
        for target, new in zip(targets, _tensors(function(*args, **kwargs)), strict=True):
            target.copy_(new)

    return play
