"""Whether two models compute the same, judged by how much one of them differs from itself between two runs.

Rewrites of a model, such as folding a scale, must not change its function. In floating point they change its last bits, since
numbers are rounded at other places. So the difference of two models is held against the precision of their dtypes, and against
the *noise*: the difference of two runs of the original, which is not zero on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.errors import EquivalenceError
from quantkit.model.compiled import eagerly, uncompiled
from quantkit.model.modules import call, evaluating, tensors_in


@dataclass(frozen=True)
class Equivalence:
    """How far two models are apart on one batch. ``print`` it for a verdict in words.

    Attributes:
        error: the root mean square of their difference over that of the reference, for the output tensor with the largest.
        noise: the same between two runs of the reference.
        tolerance: the largest error that is allowed.
    """

    error: float
    noise: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the models agree."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "equivalent" if self.holds else "NOT equivalent"
        return f"{verdict}: relative error {self.error:.2e}, allowed {self.tolerance:.1e}, noise floor {self.noise:.1e}"


@eagerly
def verify_equivalence(
    model: nn.Module, reference: nn.Module | Sequence[Tensor], batch: Any, *, tolerance: float | None = None
) -> Equivalence:
    """Compare ``model`` with ``reference`` on ``batch``.

    Args:
        model: the model to check.
        reference: the original model, or the list of its output tensors on the same batch.
        batch: a tensor, a dict of keyword arguments or a tuple of arguments.
        tolerance: the largest error to allow; by default see :func:`tolerance_for`.

    Returns:
        An :class:`Equivalence`, whose ``holds`` says whether the models agree. Models that differ raise nothing.

    Raises:
        EquivalenceError: the reference returns no floating-point tensor.
    """
    model = uncompiled(model)
    if isinstance(reference, nn.Module):
        original = uncompiled(reference)
        wanted = outputs_of(original, batch)
        noise = relative_error(wanted, outputs_of(original, batch))
    else:
        wanted = list(reference)
        noise = 0.0
    if not wanted:
        raise EquivalenceError("the reference returns no floating-point tensor, so there is nothing to compare")
    error = relative_error(wanted, outputs_of(model, batch))
    return Equivalence(error, noise, tolerance_for(wanted, noise, model) if tolerance is None else tolerance)


def outputs_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """Copies of the floating-point tensors among the outputs of the model on ``batch``, in eval mode and without gradients."""
    with evaluating(model):
        return [t.detach().clone() for t in tensors_in(call(model, batch))]


def run_alike(model: nn.Module, batch: Any, seed: int = 0) -> list[Tensor]:
    """:func:`outputs_of`, with the same random numbers in every run of the same ``seed``."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng([device.index for device in devices]):
        torch.manual_seed(seed)
        return outputs_of(model, batch)


def decibels(wanted: Tensor, got: Tensor, measure: Callable[..., float] | None = None) -> float:
    """By how much ``wanted`` is larger than the difference, in dB; infinities that agree do not differ.

    ``measure`` is how the relative size of the difference is taken, by default as :func:`relative_error` takes it.
    """
    error = (measure or relative_error)([wanted], [got])
    return -20 * math.log10(error) if 0 < error < math.inf else math.inf if error == 0 else -math.inf


def relative_error(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The root mean square of the difference of two tensors over that of the first, the largest of all pairs.

    Infinities that agree, such as masked logits, count as equal. Where shapes differ, something became infinite or something is
    not a number, the error is infinite: such values prove nothing.
    """
    if len(reference) != len(other) or any(a.shape != b.shape for a, b in zip(reference, other, strict=True)):
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        a, b = a.double(), b.double()
        difference, signal = torch.where(a == b, 0.0, a - b), torch.where(a.isinf(), 0.0, a)
        error = float(difference.pow(2).mean().sqrt() / signal.pow(2).mean().sqrt().clamp_min(1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def tolerance_for(outputs: Sequence[Tensor], noise: float, model: nn.Module | None = None) -> float:
    """The relative error that rounding alone may cause: the largest of 1e-5, eight times epsilon, and ten times the noise.

    Epsilon is that of the shortest format among the ``outputs`` and, if a model is given, its parameters: logits in float32
    of a model in bfloat16 are no better than its weights. Parameters of one byte are codes, and do not count.
    """
    weights = () if model is None else (p for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
    eps = max((torch.finfo(t.dtype).eps for t in (*outputs, *weights)), default=0.0)
    return max(1e-5, 8 * eps, 10 * noise)
