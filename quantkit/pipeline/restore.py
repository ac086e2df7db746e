"""What has to be put back: rewrites of the float model after an error, and experts that were taken apart for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from quantkit.model.experts import put_back, unfuse
from quantkit.pipeline.check import BROKEN

KEPT_BYTES = 2**30
"""Float weights up to this stay in memory until the converted model has been verified, so that it can be given back."""


def can_be_kept(model: nn.Module) -> bool:
    """Whether the float weights of ``model`` are small enough to be kept beside the INT8 ones for a while."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) <= KEPT_BYTES


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[ExitStack]:
    """Gives a stack to which every change of the float model adds how to undo it. An error inside undoes all of them.

    Not so once linears are on their way to INT8: then the model carries the mark :data:`~quantkit.pipeline.check.BROKEN`, and
    is of no use any more.
    """
    undo = ExitStack()
    try:
        yield undo
    except BaseException:
        if not getattr(model, BROKEN, False):
            setattr(model, BROKEN, True)  # an interruption from here on would leave it half way
            undo.close()
            delattr(model, BROKEN)
        raise


@contextmanager
def experts_apart(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, fused experts are linears, if that is wanted; afterwards those are fused again of which none was quantized."""
    apart = unfuse(model) if wanted else []
    try:
        yield
    finally:
        put_back(model, apart)
