"""Rotations of whole spaces written into the float weights: the residual stream, and the heads of attention.

``y = norm(x) W^T`` becomes ``norm(x R) (W R)^T``, where what wrote ``x`` now writes ``x R``. Nothing is left to do at run time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import MethodError
from quantkit.core.rotation import BlockRotation
from quantkit.discovery.residual import Gain, Heads, Stream, blocks_of
from quantkit.model.modules import weight_of

log = logging.getLogger("quantkit")


@dataclass(frozen=True)
class Turn:
    """Which spaces of a model to rotate, as data.

    Attributes:
        stream: the residual stream, or None to leave it.
        heads: value projections with their readers.
        seed: of the signs of the rotations.
        block: channels of the stream that are rotated together, a divisor of its width; None for all.
        order: ``[H]`` int64, the channels of the stream block by block.
    """

    stream: Stream | None = None
    heads: tuple[Heads, ...] = ()
    seed: int = 0
    block: int | None = None
    order: Tensor | None = None

    @property
    def rotation(self) -> BlockRotation:
        """Of the stream."""
        assert self.stream is not None
        return BlockRotation(self.block or self.stream.width, self.seed, self.order)

    def space_of(self, linears: Sequence[str]) -> str:
        """Which rotated space these linears read, for the report; empty for none."""
        if self.stream is not None and all(name in self.stream.readers for name in linears):
            return "residual stream"
        width = next((h.width for h in self.heads if set(linears) <= set(h.readers)), None)
        return "" if width is None else f"heads of {width}"


@torch.no_grad()
def turn(model: nn.Module, what: Turn, undo: ExitStack) -> list[str]:
    """Rotate in place, in float64, cast once; ``undo.close()`` puts every bit back.

    Returns:
        What was done, for the report.

    Raises:
        MethodError: weights are shared, or a norm is biased, in a way that a rotation cannot keep. The caller is to undo.
    """
    stream, said = what.stream, []
    if stream is not None:
        untied = _untie(model, stream, undo)
        count = f"{len(stream.embeddings)} embeddings and {len(stream.writers)} linears write it, {len(stream.readers)} read it"
        said.append(f"residual stream of {stream.width} channels rotated in blocks of {what.rotation.width}: {count}")
        said += [f"{name} is no longer tied to the embedding, {size / 2**20:.1f} MiB more" for name, size in untied.items()]
    if what.heads:
        said.append(f"values rotated within heads in front of {len({n for h in what.heads for n in h.readers})} linears")
    _Turner(model, what, undo).run()
    return said


class _Turner:
    def __init__(self, model: nn.Module, what: Turn, undo: ExitStack) -> None:
        self.model, self.what, self.undo = model, what, undo

    def run(self) -> None:
        stream, heads = self.what.stream, self.what.heads
        names = dict.fromkeys(name for h in heads for name in (h.writer, *h.readers))
        columns: dict[str, tuple[Tensor, Tensor | None]] = {}
        if stream is not None:
            rotation = self.what.rotation
            names |= dict.fromkeys((*stream.readers, *stream.writers))
            columns = self._norms(stream, rotation)
            done: set[int] = set()
            for name in stream.embeddings:
                weight = self.model.get_submodule(name).get_parameter("weight").detach()
                if weight.data_ptr() not in done:
                    self._write(weight, rotation.apply(weight))
                done.add(weight.data_ptr())
            shared = {name for name in stream.readers if _weight(self.model, name).data_ptr() in done}
            names = {name: None for name in names if name not in shared}  # rotated with the embedding
        for name in names:
            self._linear(name, columns.get(name))

    def _norms(self, stream: Stream, rotation: BlockRotation) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Take gain and bias out of the norms: reader -> ``[H]`` that its columns take, and ``[H]`` that its bias takes."""
        columns: dict[str, tuple[Tensor, Tensor | None]] = {}
        for norm, gain in stream.gains.items():
            readers = [name for name, source in stream.readers.items() if source == norm]
            factor, shift = values_of(self.model.get_submodule(norm), gain)
            into_readers = shift is not None and all(_bias(self.model, name) is not None for name in readers)
            columns |= dict.fromkeys(readers, (factor, shift if into_readers else None))
            if not readers:
                continue  # neutral already
            if shift is not None and not into_readers and bool(((factor == 0) & (shift != 0)).any()):
                raise MethodError(
                    f"the norm {norm!r} has a channel with a bias and no gain, and {readers[0]!r} has no bias to take it"
                )
            module = self.model.get_submodule(norm)
            if gain.weight is not None:
                weight = module.get_parameter(gain.weight).detach()
                self._write(weight, torch.full_like(weight, gain.neutral))
            if gain.bias is not None and shift is not None:
                bias = module.get_parameter(gain.bias).detach()
                inside = torch.where(shift == 0, 0.0, shift / factor)  # in front of the gain, where it turns with the stream
                self._write(bias, torch.zeros_like(bias) if into_readers else rotation.apply(inside))
        return columns

    def _linear(self, name: str, columns: tuple[Tensor, Tensor | None] | None) -> None:
        stream, stored, bias = self.what.stream, _weight(self.model, name), _bias(self.model, name)
        weight, new_bias = stored.double(), None if bias is None else bias.double()
        if stream is not None and name in stream.readers:
            if columns is not None:
                factor, shift = columns
                new_bias = new_bias if new_bias is None or shift is None else new_bias + weight @ shift
                weight = weight * factor
            weight = self.what.rotation.apply(weight)
        for heads in self.what.heads:
            rotation, rows = BlockRotation(heads.width, self.what.seed), blocks_of(heads).flatten().to(weight.device)
            if name in heads.readers:
                weight = rotation.apply(weight)
            if name == heads.writer:
                weight = weight.index_copy(0, rows, rotation.apply(weight[rows].T).T)
                new_bias = None if new_bias is None else new_bias.index_copy(0, rows, rotation.apply(new_bias[rows]))
        if stream is not None and name in stream.writers:
            rotation = self.what.rotation
            weight = rotation.apply(weight.T).T
            new_bias = None if new_bias is None else rotation.apply(new_bias)
        self._write(stored, weight)
        if bias is not None and new_bias is not None:
            self._write(bias, new_bias)

    def _write(self, stored: Tensor, new: Tensor) -> None:
        self.undo.callback(stored.copy_, stored.clone())
        stored.copy_(new)


def values_of(norm: nn.Module, gain: Gain) -> tuple[Tensor, Tensor | None]:
    """What the norm multiplies by and what it adds, ``[H]`` float64; None for no bias."""
    bias = None if gain.bias is None else norm.get_parameter(gain.bias).detach().to(torch.float64, copy=True)
    if gain.weight is None:
        device = bias.device if bias is not None else None
        return torch.ones(1, dtype=torch.float64, device=device), bias
    return norm.get_parameter(gain.weight).detach().double() + (1.0 - gain.neutral), bias


def _weight(model: nn.Module, name: str) -> Tensor:
    return weight_of(model.get_submodule(name))


def _bias(model: nn.Module, name: str) -> Tensor | None:
    bias: Any = getattr(model.get_submodule(name), "bias", None)
    return None if bias is None else bias.detach()


def _untie(model: nn.Module, stream: Stream, undo: ExitStack) -> dict[str, int]:
    """Give linears that read the stream with an embedding's weight one of their own, unless no gain has to go into it.

    Returns:
        Their names and sizes in bytes.
    """
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel():
                owners.setdefault(parameter.data_ptr(), set()).add(name)
    embeddings, apart = set(stream.embeddings), {}
    for name in (*stream.embeddings, *stream.writers, *stream.readers):
        weight: Any = model.get_submodule(name).weight
        together = owners[weight.data_ptr()] - {name}
        readers = together - embeddings
        if not together or (name in embeddings and all(other in stream.readers for other in readers)):
            continue
        if name not in stream.readers or not together <= embeddings:
            raise MethodError(f"{name!r} shares its weight with {', '.join(sorted(together))}, and cannot be rotated with it")
        norm = stream.readers[name]
        factor, shift = (torch.ones(1), None) if norm is None else values_of(model.get_submodule(norm), stream.gains[norm])
        absorbs_bias = shift is not None and _bias(model, name) is not None and bool(shift.any())
        if bool((factor == 1).all()) and not absorbs_bias:
            continue
        apart[name] = weight.nbytes
    for name in apart:
        linear: Any = model.get_submodule(name)
        old = linear.weight
        undo.callback(setattr, linear, "weight", old)
        linear.weight = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    if apart:
        _tell_transformers(model, undo)
        again = apart.keys() & {key.removesuffix(".weight") for key in getattr(model, "all_tied_weights_keys", ())}
        if again:
            raise MethodError(
                f"{', '.join(again)} has to have a weight of its own, and {type(model).__name__} would tie it again on loading"
            )
        log.warning("%s: no longer tied to the embedding, since the gain of the last norm goes into it", ", ".join(apart))
    return apart


def _tell_transformers(model: Any, undo: ExitStack) -> None:
    """Its config says whether head and embedding are one, when a checkpoint is opened again."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        if getattr(config, "tie_word_embeddings", False):
            undo.callback(setattr, config, "tie_word_embeddings", True)
            config.tie_word_embeddings = False
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys") and hasattr(module, "get_expanded_tied_weights_keys"):
            undo.callback(setattr, module, "all_tied_weights_keys", module.all_tied_weights_keys)
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=False)
