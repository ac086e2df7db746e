"""A model as a chain of blocks, for calibrators that learn one block at a time."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantkit.core.errors import MethodError
from quantkit.model.modules import all_tensors, call, evaluating, map_tensors

Place = Literal["device", "cpu", "disk"]


def find_blocks(model: nn.Module, linears: Iterable[str]) -> tuple[str, ...]:
    """Names of the blocks: the entries of that module list in which most of ``linears`` are.

    Lists whose entries are all of one class come first; hybrid models have blocks of two classes in an ``nn.ModuleList``.

    Raises:
        MethodError: there is none.
    """
    wanted = list(linears)
    for one_class, kinds in ((True, (nn.ModuleList, nn.Sequential)), (False, (nn.ModuleList,))):
        best: tuple[str, ...] = ()
        most = 0
        for name, module in model.named_modules():
            if not isinstance(module, kinds) or (one_class and len({type(child) for child in module}) != 1):
                continue
            blocks = tuple(f"{name}.{child}" if name else child for child, _ in module.named_children())
            count = sum(linear.startswith(tuple(f"{block}." for block in blocks)) for linear in wanted)
            if count > most:  # of a list and one inside of it, the outer comes first
                best, most = blocks, count
        if 2 * most > len(wanted):
            return best
    raise MethodError(
        "no blocks were found: it learns block by block, and wants most of the layers in an nn.ModuleList (or an nn.Sequential "
        "with entries of one class); 'smoothquant' and 'gptq' need no blocks"
    )


def samples_of(batches: Iterable[Any], count: int) -> list[Any]:
    """At most ``count`` batches of one sample each; a batch that cannot be taken apart stays whole."""
    return list(islice((piece for batch in batches for piece in _pieces(batch)), count))


def _pieces(batch: Any) -> Iterator[Any]:
    tensors = all_tensors(batch)
    lengths = {len(t) if t.dim() else -1 for t in tensors}
    # As in a probe: rows of plain features are tokens, not samples.
    rows = any(t.dim() > 2 or (t.dim() == 2 and not t.is_floating_point()) for t in tensors)
    if len(lengths) != 1 or not rows:
        yield batch
        return
    for i in range(lengths.pop()):
        yield map_tensors(batch, lambda t, i=i: t[i : i + 1])


@dataclass
class Call:
    """How a block is called on one sample: everything but its hidden state, whose place is marked by ``key``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for another hidden state, computed in the dtype of ``hidden``."""

        def cast(value: Any) -> Any:
            return map_tensors(value, lambda t: t.to(hidden.dtype) if t.is_floating_point() else t)

        args, kwargs = cast(self.args), cast(self.kwargs)
        if isinstance(self.key, int):
            args = (*args[: self.key], hidden, *args[self.key + 1 :])
        else:
            kwargs[self.key] = hidden
        return _first(block(*args, **kwargs))


def _first(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(tensor, Tensor):
        raise MethodError(
            f"a block returned a {type(output).__name__}: blocks return their hidden state, or a tuple that starts with it"
        )
    return tensor


class Stream:
    """One hidden state per sample, kept where there is room for it."""

    def __init__(self, place: Place, device: torch.device) -> None:
        self.device, self.place = device, place
        self.tensors: dict[int, Tensor] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="quantkit-stream-")) if place == "disk" else None
        if self._folder is not None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __setitem__(self, index: int, x: Tensor) -> None:
        x = x.detach()
        if self._folder is not None:
            known = self.tensors.get(index)
            if known is None or known.shape != x.shape or known.dtype != x.dtype:
                file = self._folder / f"{index}-{len(x.shape)}-{x.numel()}-{str(x.dtype)[6:]}"
                known = torch.from_file(str(file), shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)
            known.copy_(x)
            self.tensors[index] = known
        else:
            self.tensors[index] = x.to(self.device if self.place == "device" else "cpu", copy=True)

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors[index].to(self.device)


def record_calls(
    model: nn.Module, blocks: tuple[str, ...], samples: list[Any], place: Place
) -> tuple[Stream, list[list[Call]]]:
    """Run the float model once: the inputs of the first block, and how each block is called on each sample.

    Returns:
        The stream, and ``calls[sample][block]``.

    Raises:
        MethodError: the blocks are no chain, each reading what the one before it returned.
    """
    device = next(model.get_submodule(blocks[0]).parameters()).device
    stream = Stream(place, device)
    calls: list[list[Call]] = []
    seen: list[tuple[Call, Tensor]] = []
    returned: list[Tensor] = []
    pool: list[Tensor] = []

    def shared(t: Tensor) -> Tensor:
        """Masks and positions are the same in most samples: of those in the first, one copy is enough."""
        for known in pool:
            if known is t or (known.shape == t.shape and known.dtype == t.dtype and torch.equal(known, t)):
                return known
        if not calls:
            pool.append(t)
        return t

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key, hidden = _hidden(args, kwargs)
        index = len(seen)
        if index and (len(returned) < index or not torch.equal(returned[-1], hidden)):
            raise MethodError(f"block {blocks[index]!r} does not read what {blocks[index - 1]!r} returned: they are no chain")
        rest = tuple(None if i == key else a for i, a in enumerate(args))
        others = {k: v for k, v in kwargs.items() if k != key}
        seen.append((Call(map_tensors(rest, shared), map_tensors(others, shared), key), hidden))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        returned.append(_first(output))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in blocks:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        for index, sample in enumerate(samples):
            call(model, sample)
            if len(seen) != len(blocks):
                raise MethodError(f"{len(seen)} of {len(blocks)} blocks ran: every block has to run once, in order")
            stream[index] = seen[0][1]
            calls.append([c for c, _ in seen])
            seen.clear()
            returned.clear()
    return stream, calls


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    """The hidden state among the arguments of a block: the first floating-point tensor."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return key, value
    raise MethodError("a block was called without a floating-point tensor")
