"""Rotation of whole spaces, written into the weights (QuaRot, Ashkboos et al. 2024, section 4; R1 and R2 of SpinQuant, Liu et
al. 2024, section 3).

This file decides: which spaces, and which channels of the residual stream share a block. :mod:`quantkit.discovery` finds the
spaces and proves that they rotate; :mod:`quantkit.pipeline.rotate` rewrites the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantkit.calibration.statistics import Statistic
from quantkit.calibrators.base import Plan, Stage, View
from quantkit.core.errors import MethodError, QuantkitError
from quantkit.core.sites import Kept
from quantkit.core.spaces import ResidualStream, SpaceRotation
from quantkit.discovery import discover
from quantkit.discovery.heads import find_heads
from quantkit.discovery.norms import values_of
from quantkit.discovery.residual import find_stream
from quantkit.model.modules import call, evaluating, first_input, weight_of


@dataclass(frozen=True)
class Rotate:
    """Rotate the residual stream, and the values of attention within their heads, in the float weights.

    The function of the model stays what it is, and no channel is much larger than the others any more. Nothing is left to do
    at run time: every norm has a gain of one afterwards, and the model is a plain one of its architecture. It comes first in a
    list of methods, since it rewrites the model that all others look at.

    Only what is proven to rotate is rotated. The stream is multiplied by a matrix that keeps the mean over channels, so
    that it works with LayerNorm as with RMSNorm. Values in front of the attention's output projection are multiplied by a
    matrix as wide as a head. Inputs of down projections cannot be covered in the weights; ``[Rotate(), SmoothQuant(0.5),
    Hadamard()]`` rotates those at run time.

    An output head that is tied to the embedding gets a weight of its own, unless the gain of the last norm is one everywhere.

    Nothing can be smoothed ahead of this rotation, since no scale of single channels passes a norm without gain. So the
    rotation itself keeps apart what should not be mixed: a channel that is large, and that the linears hardly read, would drown
    small channels that matter. Channels are sorted by the ratio of the two on the first batch, and are rotated within blocks
    of neighbours in this order. ``SmoothQuant`` can balance the blocks afterwards.

    Args:
        stream: rotate the residual stream. A model whose stream does not rotate is refused.
        heads: rotate values where heads are found.
        block: channels of the stream to rotate together, of which the nearest divisor of its width is taken; ``"full"`` for
            all.
        seed: of the random signs in the matrices.

    Raises:
        MethodError: ``block`` or ``seed`` has another type or is too small, or both spaces are switched off.
    """

    name: ClassVar[str] = "rotate"
    stage: ClassVar[Stage] = Stage.MODEL
    statistics: ClassVar[tuple[type[Statistic], ...]] = ()

    stream: bool = True
    heads: bool = True
    block: int | str = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise MethodError(f"Rotate(seed={self.seed!r}): a seed is an integer")
        if self.block != "full" and (isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2):
            raise MethodError(f"Rotate(block={self.block!r}): a block is a number of channels from 2 up, such as 64, or 'full'")
        if not self.stream and not self.heads:
            raise MethodError("Rotate(stream=False, heads=False) would rotate nothing: leave it out")

    def plan(self, view: View) -> Plan:
        batch, whole = view.batches()
        try:
            found = discover(view.model, batch)
        except (QuantkitError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise MethodError(
                "the model does not run while its linears put out made-up values, by which its stream would be found "
                f"({type(error).__name__}: {error}); leave Rotate out, and Hadamard() rotates any linear's input at run time"
            ) from error
        if Kept.NEVER_RAN in found.kept.values():
            batch, found = whole, discover(view.model, whole)  # more tokens reach more experts
        try:
            stream = find_stream(view.model, batch) if self.stream else None
        except MethodError as error:
            more = "Rotate(stream=False) rotates values only" if self.heads else "leave Rotate out"
            raise MethodError(f"{error}; {more}, and Hadamard() rotates any linear's input at run time") from None
        heads = find_heads(view.model, batch, found.sites) if self.heads else []
        if stream is None:
            if not heads:
                raise MethodError("no value projection was found whose heads rotate; leave Rotate out")
            return Plan(rotate=SpaceRotation(None, tuple(heads), self.seed))
        block = stream.width if isinstance(self.block, str) else _nearest_divisor(stream.width, self.block)
        order = None if block == stream.width else _order(view.model, whole, stream, found.kept.keys())
        return Plan(rotate=SpaceRotation(stream, tuple(heads), self.seed, block, order))


def _nearest_divisor(width: int, block: int) -> int:
    """The divisor of ``width`` from 2 up whose ratio to ``block`` is nearest to one."""
    return min((d for d in range(2, width + 1) if width % d == 0), key=lambda d: abs(log(d / block)), default=width)


@torch.no_grad()
def _order(model: nn.Module, batch: Any, stream: ResidualStream, kept: Collection[str]) -> Tensor:
    """Channels of the stream, from those that are read most for their size to those that are read least, ``[H]`` int64.

    For each norm, a channel has a ratio: the root mean square of the normalized stream, over that of the columns behind the
    norm with the gain in them. The logarithms of these ratios are added up over all norms, and sorted.

    Args:
        kept: linears that stay in floating point, and do not count as readers.
    """
    behind: dict[str, list[str]] = {}  # norm, or linear that reads the stream through no norm with parameters -> readers
    for reader, norm in stream.readers.items():
        if reader not in kept:
            behind.setdefault(norm or reader, []).append(reader)
    energy: dict[str, Tensor] = {}

    def watch(norm: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_input(args, kwargs).reshape(-1, stream.width).double()
            if norm in stream.gains:
                factor, shift = values_of(model.get_submodule(norm), stream.gains[norm])
                x = (x if shift is None else x - shift) / factor
            energy[norm] = energy.get(norm, torch.zeros_like(x[0])) + x.pow(2).sum(0)

        return hook

    with ExitStack() as stack, evaluating(model):
        for norm, readers in behind.items():
            hook = model.get_submodule(readers[0]).register_forward_pre_hook(watch(norm), with_kwargs=True)
            stack.callback(hook.remove)
        call(model, batch)
    total = torch.zeros(stream.width, dtype=torch.float64, device="cpu")
    for norm, seen in energy.items():
        weight = torch.cat([weight_of(model.get_submodule(name)) for name in behind[norm]]).double()
        if norm in stream.gains:
            weight = weight * values_of(model.get_submodule(norm), stream.gains[norm])[0]
        ratio = (seen.log() - weight.pow(2).mean(0).log()).cpu()
        finite = ratio.isfinite()  # a channel without a gain has no ratio
        total += torch.where(finite, ratio, ratio[finite].median() if bool(finite.any()) else 0.0)
    return total.argsort(stable=True)
