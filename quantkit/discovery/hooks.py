"""Folds and orders played through hooks on the real model, before a weight is touched.

Folding changes the output of one module and makes up for it in the input of others. The same can be had with hooks, which are
gone afterwards: a forward hook on the producer changes its output, and a pre-hook on each linear that reads it changes it back.
If the model's outputs stay what they are, the fold is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantkit.core.sites import Site
from quantkit.model.modules import first_input


class PlayedFold(NamedTuple):
    """A fold to be played.

    Attributes:
        site: whose channels.
        rows: ``(factor, shift)``, both ``[n]``: the first n output channels y of the site's producer become
            ``(y - shift) * factor``. None if the producer's parameters have been changed already.
        scale, shift: both ``[K]``: the input x of every linear of the site becomes ``x * scale + shift``, which undoes it.
    """

    site: Site
    rows: tuple[Tensor, Tensor] | None
    scale: Tensor
    shift: Tensor


class PlayedOrder(NamedTuple):
    """An order of channels to be played.

    Attributes:
        readers: names of the linears that read the channels.
        inverse: ``[K]`` int64: their input x becomes ``x[..., inverse]``, which undoes the order.
        sources: name of a linear -> ``[n]`` int64: its first n output channels are those at these places.
    """

    readers: Sequence[str]
    inverse: Tensor
    sources: Mapping[str, Tensor]


@contextmanager
def folded_by_hooks(model: nn.Module, folds: Sequence[PlayedFold]) -> Iterator[None]:
    """While the context is open, the model runs as if ``folds`` had been made.

    Hooks that users have put on a module run on what it will put out and read: behind those here on its output, and before
    those on its input.
    """
    with ExitStack() as stack:
        for site, rows, scale, shift in folds:
            if rows is not None:
                assert site.producer is not None
                producer = model.get_submodule(site.producer.module)
                stack.callback(producer.register_forward_hook(_change_output(*rows), prepend=True).remove)
            for name in site.linears:
                hook = model.get_submodule(name).register_forward_pre_hook(_change_input(scale, shift), with_kwargs=True)
                stack.callback(hook.remove)
        yield


@contextmanager
def reordered_by_hooks(model: nn.Module, orders: Sequence[PlayedOrder]) -> Iterator[None]:
    """While the context is open, the model runs as if its channels had been reordered.

    A fold may be played at the same time, with its context opened last: outputs are reordered after its hooks have changed
    them, and inputs are brought back to the old order before its hooks see them.
    """
    with ExitStack() as stack:
        for readers, inverse, sources in orders:
            for name, source in sources.items():
                stack.callback(model.get_submodule(name).register_forward_hook(_reorder_output(source), prepend=True).remove)
            for name in readers:
                linear = model.get_submodule(name)
                hook = linear.register_forward_pre_hook(_reorder_input(inverse), with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _reorder_output(source: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        whole = torch.arange(output.shape[-1], device=output.device, dtype=torch.int64)
        whole[: len(source)] = source.to(output.device)
        return output[..., whole]

    return hook


def _reorder_input(order: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs)
        return _called_on(x[..., order.to(x.device)], args, kwargs)

    return hook


def _change_output(factor: Tensor, shift: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        n = output.shape[-1] - len(factor)
        whole, less = torch.cat([factor, factor.new_ones(n)]), torch.cat([shift, shift.new_zeros(n)])
        precise = output.to(torch.promote_types(output.dtype, torch.float32))  # shifts may cancel: one rounding is enough
        return ((precise - less.to(precise)) * whole.to(precise)).to(output.dtype)

    return hook


def _change_input(scale: Tensor, shift: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = first_input(args, kwargs)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return _called_on((precise * scale.to(precise) + shift.to(precise)).to(x.dtype), args, kwargs)

    return hook


def _called_on(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with ``x`` in place of the linear's input, which may have come by name."""
    return (x, *args[1:]), {key: value for key, value in kwargs.items() if key != "input"}
