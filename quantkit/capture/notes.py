"""Which operators a step on a GPU calls, without keeping its tensors: each is known by what it was like."""

from __future__ import annotations

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

from quantkit.capture.record import by_values, own_forwards
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
        refused: why they cannot be made again without what called them, if so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Note] = []
        self.refused: str | None = None
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
            place = leaf.untyped_storage()._cdata
            if fresh or place not in self._memory:
                self._count += 1
                self._memory[place] = self._count
            found = Ref(leaf, self._memory[place], None if made else leaf)
            self._refs[id(leaf)] = weakref.ref(leaf), found
            return found

        return tree_map(ref, tree)

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
            function, refs, named, self.of(out, made=True, fresh=places.isdisjoint(lies)), _written(function, refs, named)
        )
        random = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        literal = function in LITERALS  # made of numbers of Python, which is not asked again
        if hasattr(function, "_schema") and not random and not note.written and all(r.constant or literal for r in note.read):
            for ref, tensor in zip(refs_in(note.out), (t for t in tree_leaves(out) if isinstance(t, Tensor)), strict=True):
                ref.constant, ref.held = True, tensor
        self.calls.append(note)
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if by_values(func, args):
            self.refused = self.refused or f"it decides by values of tensors ({func})"
        return self.add(func, args, kwargs or {}, lambda: func(*args, **(kwargs or {})))

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """While the context is open, an INT8 layer of ``model`` is one call, and so is attention."""
        layers = {id(m): m for m in model.modules() if isinstance(m, W8A8Linear)}.values()

        def apart(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with _disable_current_modes():
                    return call()

            return run

        def stand_in(layer: W8A8Linear) -> Callable[[Tensor], Tensor]:
            return lambda x: self.add(layer, (x,), {}, apart(lambda: W8A8Linear.forward(layer, x)))

        class Attention(TorchFunctionMode):
            def __torch_function__(mode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: N805
                call = lambda: func(*args, **(kwargs or {}))  # noqa: E731
                return self.add(func, args, kwargs or {}, apart(call)) if func is F.scaled_dot_product_attention else call()

        with own_forwards({layer: stand_in(layer) for layer in layers}), Attention(), self:
            yield


def _written(function: Any, args: Any, kwargs: Any) -> tuple[Ref, ...]:
    """What it changes in place."""
    schema = getattr(function, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
    writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return tuple(refs_in([given.get(name) for name in writes]))
