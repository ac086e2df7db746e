"""Whether a subclass of ``nn.Linear`` with a forward of its own is a linear all the same: it is tried.

One input at one size shows little: a clamp is not seen below its limits, and rounding of weights not where these happen to lie
on the grid. So inputs of many sizes are tried, and then other parameters, whose columns are multiplied by powers of two for
which the input makes up.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = (1e-3, 1.0, 1e3, 1e6)


def fault_of(module: nn.Linear) -> str | None:
    """What speaks against taking the forward of ``module`` for ``x W^T + b``, None if nothing does."""
    kind: Any = type(module)
    name = kind.__name__
    own = list(inspect.signature(kind.forward).parameters.values())[1:]
    if len(own) != 1 or own[0].kind not in (own[0].POSITIONAL_ONLY, own[0].POSITIONAL_OR_KEYWORD):
        return f"{name} takes other arguments than one input"
    if module.weight.is_meta:
        return f"{name} has a forward of its own, and no weight to try it with"
    training = module.training
    module.training = False
    try:
        with torch.no_grad():
            same = all(_gives(module, *trial) for trial in _trials(module))
    except Exception as error:  # noqa: BLE001  it is somebody else's code, which may raise anything
        return f"{name} has a forward of its own that cannot be tried alone ({type(error).__name__}: {error})"
    finally:
        module.training = training
    return None if same else f"{name} computes something else than x W^T + b"


def _trials(module: nn.Linear) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Inputs ``[rows, K]`` with the weight and the bias that the module shall have for them."""
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    n, k = weight.shape
    random = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(weight)

    x = normal(2, k)
    yield x, weight, bias
    sizes = [size for size in SIZES if 8 * size < torch.finfo(weight.dtype).max]
    yield torch.cat([x * size for size in sizes]), weight, None if bias is None else torch.zeros_like(bias)
    exponents, signs = (
        torch.randint(low, high, (k,), generator=random, dtype=torch.int64, device="cpu") for low, high in ((-3, 4), (0, 2))
    )
    powers = torch.exp2(exponents.float()) * (2.0 * signs.float() - 1)
    other = (weight + normal(n, 1) * normal(1, k) / k**0.5) * powers.to(weight)
    yield x / powers.to(weight), other, None if bias is None else normal(n)


def _gives(module: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the module, with these parameters for a moment, gives in each row what a linear gives."""
    wanted = F.linear(x, weight, bias)
    with _having(module, weight, bias):
        got = type(module).forward(module, x)
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    wanted, got = wanted.double(), got.double()
    fits = wanted.isfinite().all(-1)  # the largest sizes may be beyond a short format
    off, size = (got - wanted)[fits].norm(dim=-1), wanted[fits].norm(dim=-1)
    return bool((off <= max(1e-3, 2 * torch.finfo(x.dtype).eps) * size).all())


@contextmanager
def _having(module: nn.Linear, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """While the context is open, other parameters are in the places of its own, which are not written to."""
    own = dict(module._parameters)
    module._parameters.update(
        weight=nn.Parameter(weight, requires_grad=False), bias=None if bias is None else nn.Parameter(bias, requires_grad=False)
    )
    try:
        yield
    finally:
        module._parameters.clear()
        module._parameters.update(own)
