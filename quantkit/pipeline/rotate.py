"""Rotations of whole spaces, written into the float weights: the residual stream, and the heads of attention.

Where ``y = norm(x) W^T`` reads the stream, it becomes ``norm(x R) (W R)^T``, and what wrote ``x`` now writes ``x R``. Nothing
of the rotation is left to do at run time, and the model is a plain one of its architecture (QuaRot, Ashkboos et al. 2024,
section 4; R1 and R2 in SpinQuant, Liu et al. 2024, section 3).

First the norms lose their gains and biases, which act on single channels, to the linears behind them. Then each weight is
multiplied once, in float64, by all matrices that concern it: by R on the side of its columns if it reads a rotated space, and
on the side of its rows if it writes one. Every change is noted on an ``ExitStack``, so that it can be taken back to the bit.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import MethodError
from quantkit.core.spaces import ResidualStream, SpaceRotation
from quantkit.discovery.norms import values_of
from quantkit.model.modules import weight_of
from quantkit.model.ties import owners_of_memory, untie

log = logging.getLogger("quantkit")


@torch.no_grad()
def rotate(model: nn.Module, what: SpaceRotation, undo: ExitStack) -> list[str]:
    """Rotate the spaces that ``what`` names, in place. Weights are computed in float64 and rounded once to their own dtype.

    Args:
        model: the float model.
        what: which spaces, and by which matrices.
        undo: ``undo.close()`` will put every bit back.

    Returns:
        What was done, in sentences for the report.

    Raises:
        MethodError: weights are shared, or a norm is biased, in a way that no rotation can keep. Part of the model may have
            been rotated by then, so the caller has to close ``undo``.
    """
    stream, said = what.stream, []
    if stream is not None:
        untied = _untie(model, stream, undo)
        count = f"{len(stream.embeddings)} embeddings and {len(stream.writers)} linears write it, {len(stream.readers)} read it"
        said.append(f"residual stream of {stream.width} channels rotated in blocks of {what.of_stream.width}: {count}")
        said += [f"{name} is no longer tied to the embedding, {size / 2**20:.1f} MiB more" for name, size in untied.items()]
    if what.heads:
        said.append(f"values rotated within heads in front of {len({n for h in what.heads for n in h.readers})} linears")
    _Rotator(model, what, undo).run()
    return said


class _Rotator:
    """Does the work of :func:`rotate` on weights that are untied already."""

    def __init__(self, model: nn.Module, what: SpaceRotation, undo: ExitStack) -> None:
        self.model, self.what, self.undo = model, what, undo

    def run(self) -> None:
        stream, heads = self.what.stream, self.what.heads
        names = dict.fromkeys(name for h in heads for name in (h.writer, *h.readers))
        from_norms: dict[str, tuple[Tensor, Tensor | None]] = {}
        if stream is not None:
            names |= dict.fromkeys((*stream.readers, *stream.writers))
            from_norms = self._neutralize_norms(stream)
            done: set[int] = set()
            for name in stream.embeddings:
                weight = self.model.get_submodule(name).get_parameter("weight").detach()
                if weight.data_ptr() not in done:
                    self._write(weight, self.what.of_stream.apply(weight))
                done.add(weight.data_ptr())
            tied = {name for name in stream.readers if _weight(self.model, name).data_ptr() in done}
            names = {name: None for name in names if name not in tied}  # rotated with the embedding
        for name in names:
            self._rotate_linear(name, *from_norms.get(name, (None, None)))

    def _neutralize_norms(self, stream: ResidualStream) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Set all gains to one. Biases go to the linears behind, where these have biases, and stay in the norm otherwise.

        Returns:
            Name of a reader -> ``[H]`` float64 that its columns have to be multiplied by, and ``[H]`` float64 that was added to
            its input and has to go into its bias, None if nothing has to.
        """
        from_norms: dict[str, tuple[Tensor, Tensor | None]] = {}
        for norm, gain in stream.gains.items():
            readers = [name for name, source in stream.readers.items() if source == norm]
            factor, shift = values_of(self.model.get_submodule(norm), gain)
            into_readers = shift is not None and all(_bias(self.model, name) is not None for name in readers)
            from_norms |= dict.fromkeys(readers, (factor, shift if into_readers else None))
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
                inside = torch.where(shift == 0, 0.0, shift / factor)  # ahead of the gain, where it is part of the stream
                self._write(bias, torch.zeros_like(bias) if into_readers else self.what.of_stream.apply(inside))
        return from_norms

    def _rotate_linear(self, name: str, factor: Tensor | None, shift: Tensor | None) -> None:
        """Rotate what this linear (or router) reads, what it writes, or both.

        Args:
            factor: ``[H]`` float64, the gain of the norm in front of it, which goes into its columns.
            shift: ``[H]`` float64, the bias of that norm, which goes into its bias.
        """
        stream, stored, stored_bias = self.what.stream, _weight(self.model, name), _bias(self.model, name)
        weight, bias = stored.double(), None if stored_bias is None else stored_bias.double()
        if stream is not None and name in stream.readers:
            bias = bias if bias is None or shift is None else bias + weight @ shift
            weight = weight if factor is None else weight * factor
            weight = self.what.of_stream.apply(weight)
        for heads in self.what.heads:
            rotation, rows = self.what.of_heads(heads), heads.blocks.flatten().to(weight.device)
            if name in heads.readers:
                weight = rotation.apply(weight)
            if name == heads.writer:
                weight = weight.index_copy(0, rows, rotation.apply(weight[rows].T).T)
                bias = None if bias is None else bias.index_copy(0, rows, rotation.apply(bias[rows]))
        if stream is not None and name in stream.writers:
            weight = self.what.of_stream.apply(weight.T).T
            bias = None if bias is None else self.what.of_stream.apply(bias)
        self._write(stored, weight)
        if stored_bias is not None and bias is not None:
            self._write(stored_bias, bias)

    def _write(self, stored: Tensor, new: Tensor) -> None:
        self.undo.callback(stored.copy_, stored.clone())
        stored.copy_(new)


def _weight(model: nn.Module, name: str) -> Tensor:
    return weight_of(model.get_submodule(name))


def _bias(model: nn.Module, name: str) -> Tensor | None:
    bias: Any = getattr(model.get_submodule(name), "bias", None)
    return None if bias is None else bias.detach()


def _untie(model: nn.Module, stream: ResidualStream, undo: ExitStack) -> dict[str, int]:
    """Give linears that share their weight with an embedding a weight of their own, if the gain of a norm has to go into it.

    Returns:
        Their names and the sizes of the new weights in bytes.

    Raises:
        MethodError: a weight that has to be rotated is shared in another way, or would be tied again on loading.
    """
    apart = untie(model, _to_untie(model, stream), undo)
    if apart:
        log.warning("%s: no longer tied to the embedding, since the gain of the last norm goes into it", ", ".join(apart))
    return apart


def _to_untie(model: nn.Module, stream: ResidualStream) -> list[str]:
    """Names of the linears that cannot go on sharing an embedding's weight; raises MethodError for other shared weights."""
    owners, embeddings, found = owners_of_memory(model), set(stream.embeddings), []
    for name in (*stream.embeddings, *stream.writers, *stream.readers):
        together = owners[model.get_submodule(name).get_parameter("weight").data_ptr()] - {name}
        others = together - embeddings
        if not together or (name in embeddings and all(other in stream.readers for other in others)):
            continue
        if name not in stream.readers or not together <= embeddings:
            raise MethodError(f"{name!r} shares its weight with {', '.join(sorted(together))}, and cannot be rotated with it")
        norm = stream.readers[name]
        factor, shift = (
            (torch.ones(1, dtype=torch.float32, device="cpu"), None)
            if norm is None
            else values_of(model.get_submodule(norm), stream.gains[norm])
        )
        absorbs_bias = shift is not None and _bias(model, name) is not None and bool(shift.any())
        if not bool((factor == 1).all()) or absorbs_bias:
            found.append(name)
    return found
