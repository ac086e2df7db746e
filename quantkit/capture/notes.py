"""Which operators a step on a GPU calls, without keeping its tensors: each is known by what it was like."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from quantkit.capture.record import Reading, by_values, in_parts, own_forwards, plain_layers, written_by
from quantkit.core.tracing import EMPTY
from quantkit.layers.linear import W8A8Linear

LITERALS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
"""What ``torch.tensor(...)`` calls."""


class Ref:
    """A tensor of a step.

    Attributes:
        shape, dtype, at: its sizes, type and address.
        memory: which memory it lies in; views of one tensor share it.
        held: the tensor, where no call made it (weights, caches, inputs), or it is always the same.
        constant: whether calls made it out of nothing that can change.
    """

    def __init__(self, tensor: Tensor, memory: int, held: Tensor | None) -> None:
        self.shape, self.dtype, self.at = tensor.shape, tensor.dtype, tensor.data_ptr()
        self.strides, self.memory, self.held = tensor.stride(), memory, held
        self.constant = False

    @property
    def rows(self) -> int:
        return self.shape[:-1].numel()

    def shows(self, other: Ref) -> bool:
        """Whether it is ``other``, seen as it is."""
        return (self.shape, self.strides, self.dtype, self.at) == (other.shape, other.strides, other.dtype, other.at)

    @property
    def side_by_side(self) -> bool:
        """Whether the last dimension is."""
        return bool(self.shape) and self.strides[-1] == 1

    @property
    def contiguous(self) -> bool:
        step, found = 1, True
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            found = found and (size == 1 or stride == step)
            step *= size
        return found


class Note(NamedTuple):
    """One call: of an operator, of attention, or of an INT8 layer. Tensors in it are :class:`Ref`."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    written: tuple[Ref, ...] = ()

    @property
    def read(self) -> list[Ref]:
        return refs_in((self.args, self.kwargs))


def refs_in(tree: Any) -> list[Ref]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Ref)]


class Notes(TorchDispatchMode):
    """Notes what is called while it is on.

    Attributes:
        calls: in their order.
        refused: why they cannot be made again, if so.
        unseen: whether kernels ran that no operator launched, so that only who launched them can do it again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Note] = []
        self.refused: str | None = None
        self.unseen = False
        self._apart = False
        self._blank: set[int] = set()
        self._places: set[torch.device] = set()
        self._refs: dict[int, tuple[Any, Ref]] = {}
        self._memory: dict[int, int] = {}
        self._count = 0

    def of(self, tree: Any, *, made: bool = False, fresh: bool = False) -> Any:
        """``tree`` with a :class:`Ref` for each tensor; ``made`` by a call, in ``fresh`` memory."""

        def ref(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            known = self._refs.get(id(leaf))
            if known is not None and known[0]() is leaf:
                return known[1]
            if leaf.is_cuda:
                self._places.add(leaf.device)
                if len(self._places) > 1:
                    self._refuse("it runs on several GPUs")
            place = leaf.untyped_storage()._cdata
            if fresh or place not in self._memory:
                self._count += 1
                self._memory[place] = self._count
            found = Ref(leaf, self._memory[place], None if made else leaf)
            self._refs[id(leaf)] = weakref.ref(leaf), found
            return found

        return tree_map(ref, tree)

    def _refuse(self, why: str) -> None:
        self.refused = self.refused or why

    def survivors(self, outputs: Any) -> list[Ref]:
        """Tensors that calls made, that are no part of ``outputs``, and that somebody holds all the same."""
        given = {ref.memory for ref in refs_in(outputs)}
        some = [ref for weak, ref in self._refs.values() if ref.held is None and weak() is not None]
        return [ref for ref in some if ref.memory not in given]

    def add(self, function: Any, args: Any, kwargs: Any, call: Callable[[], Any]) -> Any:
        """Make a call, and note it."""
        refs, named = self.of(args), self.of(kwargs)
        places = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = call()
        lies = {t.untyped_storage()._cdata for t in tree_leaves(out) if isinstance(t, Tensor)}
        note = Note(
            function, refs, named, self.of(out, made=True, fresh=places.isdisjoint(lies)),
            tuple(refs_in(written_by(function, refs, named))),
        )  # fmt: skip
        written = {ref.memory for ref in note.written}
        self.unseen = self.unseen or any(
            r.memory in self._blank and r.memory not in written for r in note.read if not views(note)
        )
        self._blank -= written
        if function in EMPTY:
            self._blank |= {ref.memory for ref in refs_in(note.out)}
        random = function in EMPTY or torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        literal = function in LITERALS  # made of numbers of Python, which is not asked again
        if hasattr(function, "_schema") and not random and not note.written and all(r.constant or literal for r in note.read):
            for ref, tensor in zip(refs_in(note.out), (t for t in tree_leaves(out) if isinstance(t, Tensor)), strict=True):
                ref.constant, ref.held = True, tensor
        self.calls.append(note)
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = in_parts(self, func, args, kwargs or {})
        if out is not NotImplemented:
            return out
        if by_values(func, args) or _leaves_the_gpu(func, args, kwargs or {}):
            self._refuse(f"it decides by values of tensors ({func})")
        return self.add(func, args, kwargs or {}, lambda: func(*args, **(kwargs or {})))

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """While the context is open, an INT8 layer of ``model`` is one call, and so is attention."""
        layers = plain_layers(model)

        def apart(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                self._apart = True
                try:
                    with _disable_current_modes():
                        return call()
                finally:
                    self._apart = False

            return run

        def stand_in(layer: W8A8Linear) -> Callable[[Tensor], Tensor]:
            def forward(input: Tensor) -> Tensor:
                out: Tensor = self.add(layer, (input,), {}, apart(lambda: W8A8Linear.forward(layer, input)))
                return out

            return forward

        class Attention(TorchFunctionMode):
            def __torch_function__(mode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: N805
                call = lambda: func(*args, **(kwargs or {}))  # noqa: E731
                if func is not F.scaled_dot_product_attention or torch.is_autocast_enabled(
                    args[0].device.type if args else "cpu"
                ):
                    return call()
                return self.add(func, args, kwargs or {}, apart(call))

        with (
            own_forwards({layer: stand_in(layer) for layer in layers}),
            Reading(self._refuse),
            Attention(),
            self._launches(),
            self,
        ):
            yield

    @contextmanager
    def _launches(self) -> Iterator[None]:
        """Notice kernels of Triton that are launched without an operator."""
        jit = sys.modules.get("triton.runtime.jit")
        if jit is None:
            yield
            return
        real = jit.JITFunction.run

        def run(function: Any, *args: Any, **kwargs: Any) -> Any:
            self.unseen = self.unseen or not self._apart
            return real(function, *args, **kwargs)

        jit.JITFunction.run = run
        try:
            yield
        finally:
            jit.JITFunction.run = real


def views(note: Note) -> bool:
    """Whether its results lie in the memory of what it read, and it writes nothing: it looks at no value."""
    memory, out = {ref.memory for ref in note.read}, refs_in(note.out)
    return not note.written and bool(out) and all(ref.memory in memory for ref in out)


def _leaves_the_gpu(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether values are copied to the CPU, where Python can read them without asking."""
    if function is torch.ops.aten._to_copy.default:
        to = kwargs.get("device")
        return bool(args[0].is_cuda and to is not None and torch.device(to).type == "cpu")
    return function is torch.ops.aten.copy_.default and args[1].is_cuda and not args[0].is_cuda
