"""Digests of tensors, numbers that are the same on every machine, and what a machine makes of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        whole.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def exact_roots() -> None:
    """From here on, square roots in this process are correctly rounded; call it once, in programs that are pinned.

    PyTorch asks MKL for them, which starts from an approximation that processors have an instruction for, whose makers round
    it in ways of their own: no environment makes an AMD and an Intel processor agree. ``x ** 0.5`` is a square root, too.
    """
    plain = torch.library.get_kernel("aten::pow.Tensor_Scalar", "CPU")

    def root(x: Tensor) -> Tensor:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        with np.errstate(invalid="ignore"):
            y = torch.from_numpy(np.asarray(np.sqrt(wide.detach().numpy())))
        return y.to(x.dtype) if x.is_floating_point() else y

    def power(keys: Any, x: Tensor, exponent: Any) -> Tensor:
        return root(x) if exponent == 0.5 else plain.call_boxed(keys, x, exponent)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered kernel")
        _KERNELS.impl("sqrt", root, "CPU")
        _KERNELS.impl("sqrt_", lambda x: x.copy_(root(x)), "CPU")
        _KERNELS.impl("pow.Tensor_Scalar", power, "CPU", with_keyset=True)


_KERNELS = torch.library.Library("aten", "IMPL")
"""Takes its kernels back when it is gone."""


def normal(*shape: int, seed: int) -> Tensor:
    """Roughly normal float32 values with a deviation of 1, exact: sums of whole numbers times one constant.

    ``torch.randn`` takes logarithms and cosines, whose last bits differ between processors.
    """
    random = torch.Generator().manual_seed(seed)
    whole = torch.randint(-1024, 1025, (4, *shape), generator=random).sum(0)  # of four uniform ones
    return whole.float() * (1 / 1183)


def arithmetic() -> dict[str, str]:
    """Digests of what plain PyTorch makes of fixed inputs, for the operations that quantkit and the models use most."""
    a, b, c = normal(40, 96, seed=1), normal(64, 96, seed=2), normal(64, seed=3)
    spd = b @ b.t() / 96 + torch.eye(64)
    q, k, v = normal(3, 2, 4, 12, 16, seed=4)
    small = a.clamp(-4, 4)
    found = {
        "matmul float32": a @ b.t(),
        "matmul float64": a.double() @ b.double().t(),
        "linear": F.linear(a, b, c),
        "addmm": torch.addmm(c, a, b.t()),
        "batched matmul": q @ k.transpose(-2, -1),
        "cholesky": torch.linalg.cholesky(spd),
        "cholesky float64": torch.linalg.cholesky(spd.double()),
        "cholesky inverse": torch.cholesky_inverse(torch.linalg.cholesky(spd)),
        "solve triangular": torch.linalg.solve_triangular(torch.linalg.cholesky(spd), b, upper=False),
        "attention": F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "exp log": torch.stack([small.exp(), small.abs().add(0.1).log(), small.abs().add(0.1).log2()]),
        "roots": torch.stack([a.abs().sqrt(), a.abs() ** 0.5, (a * a + 0.1).rsqrt()]),
        "sin cos pow": torch.stack([a.sin(), a.cos(), a.abs().pow(0.75), a.abs().pow(0.125), a.pow(2), a.pow(4)]),
        "sigmoid tanh erf": torch.stack([a.sigmoid(), a.tanh(), a.erf()]),
        "silu gelu": torch.stack([F.silu(a), F.gelu(a), F.gelu(a, approximate="tanh")]),
        "softmax": a.softmax(-1),
        "layer norm": F.layer_norm(a, (96,)),
        "rms norm": F.rms_norm(a, (96,)),
        "sums": torch.cat([a.sum(0), a.mean(0), a.square().mean(0), a.var(0), a.cumsum(0)[-1]]),
        "sums of rows": torch.stack([a.sum(1), a.mean(1), a.norm(dim=1), a.double().pow(2).sum(1).float()]),
        "distances": torch.cdist(a.double(), b.double()),
        "inverse": torch.linalg.inv(spd),
        "training": _trained(a),
    }
    return {name: digest([(name, tensor)]) for name, tensor in found.items()}


def foreign(recorded: dict[str, str], got: dict[str, str]) -> list[str]:
    """A warning, if :func:`arithmetic` here is not what it was where the record was made; nothing otherwise."""
    unlike = [name for name in recorded | got if recorded.get(name) != got.get(name)]
    if not unlike:
        return []
    text = (
        "THE FLOAT ARITHMETIC OF THIS MACHINE DIFFERS FROM THAT OF THE RECORD: plain PyTorch, without quantkit, gives "
        f"other bits for {', '.join(unlike)}. What follows need not be the fault of quantkit's code; compare on a machine, and "
        "with a torch, that computes as the record's did."
    )
    return [text]


def _trained(x: Tensor) -> Tensor:
    """The weights of a small network after three steps of Adam: gradients, and the optimizer that learns scales."""
    weights = [normal(32, 96, seed=5), normal(96, 32, seed=6)]
    parameters = [nn.Parameter(weight * 0.1) for weight in weights]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    with torch.enable_grad():
        for _ in range(3):
            optimizer.zero_grad()
            y = F.linear(F.silu(F.linear(F.layer_norm(x, (96,)), parameters[0])), parameters[1])
            F.mse_loss(y, x).backward()
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])
