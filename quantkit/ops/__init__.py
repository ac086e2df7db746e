"""INT8 arithmetic behind one door. A backend is one file that registers one object; the table below is the choice.

``linear(layer, x)`` runs a :class:`quantkit.W8A8Linear` on the first backend, in order, that supports its device.
:mod:`quantkit.ops.reference` is what every backend must equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from quantkit.core.errors import BackendError
from quantkit.ops.cpu.backend import CPU
from quantkit.ops.gpu import GPU
from quantkit.ops.plain import Plain

if TYPE_CHECKING:
    from quantkit.layers.linear import W8A8Linear


class Backend(Protocol):
    """Runs W8A8 linears on some device."""

    name: str

    def why_not(self, device: torch.device) -> str | None:
        """None if this backend can run on ``device``, else the reason in a few words."""

    def pack(self, layer: W8A8Linear) -> Any:
        """Prepare the weight of ``layer``, once: an object with ``backend`` and ``weight``, and what else the backend wants."""

    def linear(self, layer: W8A8Linear, x: Tensor) -> Tensor:
        """``x [M, K]`` float, any M >= 0, to ``[M, N]`` in its dtype."""


BACKENDS: list[Backend] = [CPU(), GPU(), Plain()]
_forced: list[str] = []


def backends(device: torch.device | str = "cpu") -> dict[str, str]:
    """Name -> "ready", or why it cannot run on ``device``, in order of preference."""
    return {b.name: b.why_not(torch.device(device)) or "ready" for b in BACKENDS}


def choose(device: torch.device) -> Backend:
    """The first backend for ``device``, or the one forced by :func:`use_backend`.

    Raises:
        BackendError: the forced backend cannot run there.
    """
    if _forced:
        backend = next(b for b in BACKENDS if b.name == _forced[-1])
        reason = backend.why_not(device)
        if reason:
            raise BackendError(f"backend {backend.name!r} cannot run on {device}: {reason}")
        return backend
    return next(b for b in BACKENDS if b.why_not(device) is None)


def forced() -> str | None:
    """The backend that :func:`use_backend` asks for now."""
    return _forced[-1] if _forced else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every layer, as ``"reference"`` in tests.

    Raises:
        BackendError: no backend has that name.
    """
    if name not in {b.name for b in BACKENDS}:
        raise BackendError(f"backend {name!r} is not known: there are {', '.join(b.name for b in BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def pack(layer: W8A8Linear) -> Any:
    """The packed weight of ``layer`` for the backend of its device."""
    return choose(layer.weight.device).pack(layer)


def linear(layer: W8A8Linear, x: Tensor) -> Tensor:
    """Run ``layer`` on ``x [M, K]``. Gradients flow to ``x`` as if nothing were rounded (straight through)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, layer)
    return _run(layer, x)


def _run(layer: W8A8Linear, x: Tensor) -> Tensor:
    if not layer.scheme.quantizes_activations:
        return _float_product(layer, x)
    backend: Backend = layer.packed.backend
    return backend.linear(layer, x)


def _float_product(layer: W8A8Linear, x: Tensor) -> Tensor:
    """Of an activation that nothing rounds, in float32: only a simulation has it, so no backend makes it faster."""
    inner, side = layer.prepare_input(x)
    y = inner.float() @ layer.dequantized_weight().t()
    if side is not None:
        assert layer.outlier_weight is not None
        y = y + side.float() @ layer.outlier_weight.float().t()
    return (y if layer.bias is None else y + layer.bias.float()).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: W8A8Linear) -> Tensor:
        ctx.layer = layer
        return _run(layer, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.input_gradient(gradient), None
