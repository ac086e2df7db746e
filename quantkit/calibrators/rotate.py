"""Rotation of whole spaces, folded into the weights (QuaRot, Ashkboos et al. 2024; R1 and R2 of SpinQuant, Liu et al. 2024)."""

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
from quantkit.core.errors import MethodError
from quantkit.discovery import discover
from quantkit.discovery.discover import NEVER_RAN
from quantkit.discovery.residual import Stream, find_heads, find_stream
from quantkit.model.modules import call, evaluating, first_input, weight_of
from quantkit.pipeline.rotate import Turn, values_of


@dataclass(frozen=True)
class Rotate:
    """Rotate the residual stream, and values within their heads, in the weights: the function stays, outlier channels go.

    Comes first, since it rewrites the float model. Afterwards every norm has a gain of one and the model is a plain one of its
    architecture, with nothing to do at run time. What is proven to turn is turned: the stream by a rotation that keeps
    the mean, so that LayerNorm commutes with it; values in front of the attention's output projection by one as wide as
    a head. Inputs of down projections are not covered; ``[Rotate(), SmoothQuant(0.5), Hadamard()]`` rotates those at run time.

    A head tied to the embedding gets a weight of its own, unless the gain of the last norm is one.

    Nothing can be smoothed before this rotation, since a norm commutes with no scale per channel. Channels that are large and
    hardly read would drown small ones that matter, if mixed. So channels are sorted by that ratio, as the first batch shows it,
    and rotated within blocks of like ones, between which ``SmoothQuant`` can still balance.

    Args:
        stream: rotate the residual stream; a model whose stream does not turn is refused.
        heads: rotate the values where heads are found.
        block: channels of the stream to rotate together; the divisor of its width that is nearest is taken. ``"full"`` for all.
        seed: of random signs.

    Raises:
        MethodError: block or seed is something else, or both spaces are off.
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
        found = discover(view.model, batch)
        if NEVER_RAN in found.kept.values():
            batch, found = whole, discover(view.model, whole)  # more tokens reach more experts
        try:
            stream = find_stream(view.model, batch) if self.stream else None
        except MethodError as error:
            more = "Rotate(stream=False) rotates values only" if self.heads else "leave Rotate out"
            raise MethodError(f"{error}; {more}, and Hadamard() rotates any linear's input at run time") from None
        heads = find_heads(view.model, batch, found.sites) if self.heads else []
        if stream is None:
            if not heads:
                raise MethodError("no value projection was found whose heads turn; leave Rotate out")
            return Plan(turn=Turn(None, tuple(heads), self.seed))
        block = stream.width if isinstance(self.block, str) else _nearest_divisor(stream.width, self.block)
        order = None if block == stream.width else _order(view.model, whole, stream, found.kept.keys())
        return Plan(turn=Turn(stream, tuple(heads), self.seed, block, order))


def _nearest_divisor(width: int, block: int) -> int:
    return min((d for d in range(2, width + 1) if width % d == 0), key=lambda d: abs(log(d / block)), default=width)


@torch.no_grad()
def _order(model: nn.Module, batch: Any, stream: Stream, kept: Collection[str]) -> Tensor:
    """Channels of the stream from those that are read most for their size to those read least, ``[H]`` int64.

    For each norm and the linears behind it: RMS of the normalized stream over that of the columns with the gain in them, in
    logarithms, whose mean over all norms is sorted.
    """
    groups: dict[str, list[str]] = {}
    for reader, norm in stream.readers.items():
        if reader not in kept:
            groups.setdefault(norm or reader, []).append(reader)
    energy: dict[str, Tensor] = {}

    def watch(group: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_input(args, kwargs).reshape(-1, stream.width).double()
            if group in stream.gains:
                factor, shift = values_of(model.get_submodule(group), stream.gains[group])
                x = (x if shift is None else x - shift) / factor
            energy[group] = energy.get(group, torch.zeros_like(x[0])) + x.pow(2).sum(0)

        return hook

    with ExitStack() as stack, evaluating(model):
        for group, readers in groups.items():
            hook = model.get_submodule(readers[0]).register_forward_pre_hook(watch(group), with_kwargs=True)
            stack.callback(hook.remove)
        call(model, batch)
    total = torch.zeros(stream.width, dtype=torch.float64)
    for group, seen in energy.items():
        weight = torch.cat([weight_of(model.get_submodule(name)) for name in groups[group]]).double()
        if group in stream.gains:
            weight = weight * values_of(model.get_submodule(group), stream.gains[group])[0]
        ratio = (seen.log() - weight.pow(2).mean(0).log()).cpu()
        fine = ratio.isfinite()  # a channel without a gain has none
        total += torch.where(fine, ratio, ratio[fine].median() if bool(fine.any()) else 0.0)
    return total.argsort(stable=True)
