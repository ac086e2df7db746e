"""A model as a chain of blocks, for calibrators that learn one block at a time.

Transformers and most other deep models are a list of blocks, each of which reads the *hidden state* that the one before it
returned. To learn a block by itself one needs the hidden states that go into it and everything else that it is called with,
such as masks and positions. :func:`find_blocks` finds the list, without knowing the architecture. :func:`record_calls` runs the
model once and records how each block is called on each sample (:class:`Call`) and the hidden states before the first block
(:class:`HiddenStates`); those before the next block follow by running the first, and so on.
"""

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
"""Where hidden states are kept: on the device of the model, in main memory, or in files of a temporary folder."""


def find_blocks(model: nn.Module, linears: Iterable[str]) -> tuple[str, ...]:
    """The names of the blocks of ``model``, in their order.

    The blocks are the entries of one module list: that which contains most of ``linears``, and more than half of them. First
    only lists are considered whose entries are all of one class, ``nn.ModuleList`` or ``nn.Sequential``. If that finds none,
    lists of mixed classes are, but only ``nn.ModuleList``: hybrid models alternate blocks of two classes, while an
    ``nn.Sequential`` of different modules is seldom a list of blocks.

    Args:
        model: the model.
        linears: names of the linears that are to be quantized.

    Raises:
        MethodError: no list contains more than half of ``linears``.
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
            if count > most:  # a list inside of a block contains no more, and comes later, so the outer list wins
                best, most = blocks, count
        if 2 * most > len(wanted):
            return best
    raise MethodError(
        "no blocks were found: it learns block by block, and wants most of the layers in an nn.ModuleList (or an nn.Sequential "
        "with entries of one class); 'smoothquant' and 'gptq' need no blocks"
    )


def samples_of(batches: Iterable[Any], count: int) -> list[Any]:
    """The first ``count`` samples of ``batches``, each as a batch of its own.

    A batch is taken apart along its first dimension if all of its tensors have the same length there. A batch that cannot be
    taken apart counts as one sample, as does one of plain features ``[rows, channels]``, whose rows are tokens.
    """
    return list(islice((piece for batch in batches for piece in _pieces(batch)), count))


def _pieces(batch: Any) -> Iterator[Any]:
    tensors = all_tensors(batch)
    lengths = {len(t) if t.dim() else -1 for t in tensors}
    # Two dimensions of floats are plain features, whose rows are tokens; two of integers are token ids, whose rows are samples.
    rows = any(t.dim() > 2 or (t.dim() == 2 and not t.is_floating_point()) for t in tensors)
    if len(lengths) != 1 or not rows:
        yield batch
        return
    for i in range(lengths.pop()):
        yield map_tensors(batch, lambda t, i=i: t[i : i + 1])


@dataclass
class Call:
    """The arguments with which a block was called on one sample, but for the hidden state.

    Attributes:
        args, kwargs: the arguments; the hidden state is left out of ``kwargs``, and replaced by None in ``args``.
        key: where the hidden state belongs, as an index of ``args`` or a key of ``kwargs``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``block`` with these arguments and the hidden state ``hidden``, and return the hidden state that it returns.

        Floating-point arguments are cast to the dtype of ``hidden`` first. The block gets copies, which it may change in place.
        """

        def cast(value: Any) -> Any:
            return map_tensors(value, lambda t: t.to(hidden.dtype if t.is_floating_point() else t.dtype, copy=True))

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


class HiddenStates:
    """The hidden states of all samples between two blocks, by the number of the sample.

    ``states[i] = x`` stores a copy, and ``states[i]`` returns a copy on the device. States may change shape and dtype.

    Args:
        place: where they are kept; files are deleted with the object.
        device: where they are returned.
    """

    def __init__(self, place: Place, device: torch.device) -> None:
        self.device, self.place = device, place
        self.tensors: dict[int, Tensor] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="quantkit-hidden-states-")) if place == "disk" else None
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
        return self.tensors[index].to(self.device, copy=True)


def record_calls(
    model: nn.Module, blocks: tuple[str, ...], samples: list[Any], place: Place
) -> tuple[HiddenStates, list[list[Call]]]:
    """Run the float model on every sample and record how its blocks are called.

    Args:
        model: only watched.
        blocks: names of the blocks, from :func:`find_blocks`.
        samples: from :func:`samples_of`.
        place: where the hidden states are kept.

    Returns:
        The hidden states that the first block reads, and ``calls[sample][block]``.

    Raises:
        MethodError: the blocks are no chain: each has to run once, in order, and read what the one before it returned.
    """
    device = next(model.get_submodule(blocks[0]).parameters()).device
    states = HiddenStates(place, device)
    calls: list[list[Call]] = []
    seen: list[Call] = []
    returned: list[Tensor] = []
    shared = _Shared()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key, hidden = _hidden(args, kwargs)
        index = len(seen)
        if index and (len(returned) < index or not torch.equal(returned[-1], hidden)):
            raise MethodError(f"block {blocks[index]!r} does not read what {blocks[index - 1]!r} returned: they are no chain")
        if not index:
            states[len(calls)] = hidden  # now, since the block may change it in place
        rest = tuple(None if i == key else a for i, a in enumerate(args))
        others = {k: v for k, v in kwargs.items() if k != key}
        seen.append(Call(map_tensors(rest, shared), map_tensors(others, shared), key))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        returned.append(_first(output))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in blocks:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        for sample in samples:
            call(model, sample)
            if len(seen) != len(blocks):
                raise MethodError(f"{len(seen)} of {len(blocks)} blocks ran: every block has to run once, in order")
            calls.append(list(seen))
            shared.grows = False
            seen.clear()
            returned.clear()
    return states, calls


class _Shared:
    """Replaces equal tensors by one copy. Masks and positions are mostly the same in all blocks and samples.

    Attributes:
        grows: whether tensors that are new are remembered. Those of the first sample are enough.
    """

    def __init__(self) -> None:
        self.grows = True
        self._tensors: list[Tensor] = []

    def __call__(self, t: Tensor) -> Tensor:
        for known in self._tensors:
            if known.shape == t.shape and known.dtype == t.dtype and torch.equal(known, t):
                return known
        own = t.clone()
        if self.grows:
            self._tensors.append(own)
        return own


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    """The hidden state among the arguments of a block, with its index or keyword: the first floating-point tensor."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return key, value
    raise MethodError("a block was called without a floating-point tensor")
