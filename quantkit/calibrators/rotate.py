"""Rotation of whole spaces, folded into the weights (QuaRot, Ashkboos et al. 2024; R1 and R2 of SpinQuant, Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantkit.calibrators.base import Plan, Stage, View
from quantkit.discovery import discover
from quantkit.discovery.stream import find_heads, find_stream
from quantkit.errors import MethodError
from quantkit.statistics import Statistic
from quantkit.turn import Turn


@dataclass(frozen=True)
class Rotate:
    """Rotate the residual stream, and values within their heads, in the weights: the function stays, outlier channels go.

    Comes first, since it rewrites the float model. Afterwards every norm has a gain of one and the model is a plain one of its
    architecture, with nothing to do at run time. What is proven to turn is turned: the stream by a full-width rotation that
    keeps the mean, so that LayerNorm commutes with it; values in front of the attention's output projection by one as wide as
    a head. Inputs of down projections are not covered; ``[Rotate(), SmoothQuant(0.5), Hadamard()]`` rotates those at run time.

    A head tied to the embedding gets a weight of its own, unless the gain of the last norm is one.

    Args:
        stream: rotate the residual stream; a model whose stream does not turn is refused.
        heads: rotate the values where heads are found.
        seed: of random signs.

    Raises:
        MethodError: seed is no integer, or both are off.
    """

    name: ClassVar[str] = "rotate"
    stage: ClassVar[Stage] = Stage.MODEL
    statistics: ClassVar[tuple[type[Statistic], ...]] = ()

    stream: bool = True
    heads: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise MethodError(f"Rotate(seed={self.seed!r}): a seed is an integer")
        if not self.stream and not self.heads:
            raise MethodError("Rotate(stream=False, heads=False) would rotate nothing: leave it out")

    def plan(self, view: View) -> Plan:
        batch = next(iter(view.batches()))
        try:
            stream = find_stream(view.model, batch) if self.stream else None
        except MethodError as error:
            more = "Rotate(stream=False) rotates values only" if self.heads else "leave Rotate out"
            raise MethodError(f"{error}; {more}, and Hadamard() rotates any linear's input at run time") from None
        heads = find_heads(view.model, batch, discover(view.model, batch).sites) if self.heads else []
        if stream is None and not heads:
            raise MethodError("no value projection was found whose heads turn; leave Rotate out")
        return Plan(turn=Turn(stream, tuple(heads), self.seed))
