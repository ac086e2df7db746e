"""The two orthogonal matrices that channels are multiplied by, as data that can apply itself.

A rotation of the input channels leaves a linear what it is, since ``(x R) (W R)^T = x W^T``, and makes both operands easier to
round: one large channel is spread over all channels of its block. There are two kinds, because there are two places for them.

* :class:`Rotation` is applied **at run time**, to every activation, while it is quantized. So it has to be cheap and is a plain
  Hadamard matrix: its blocks are powers of two, and it is computed by additions alone, in an order that every backend repeats
  to the bit. It is part of a :class:`~quantkit.core.transform.Transform`, and checkpoints store it.
* :class:`BlockRotation` is **written into the float weights** once, before anything is quantized, and nothing of it is left at
  run time. So it may cost what it likes: it takes blocks of any width, such as the 576 channels of a residual stream or the 80
  of a head, and keeps the mean over channels, which a LayerNorm that it is moved through needs. It is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.errors import MethodError


@dataclass(frozen=True)
class Rotation:
    """A rotation at run time: the block-diagonal orthogonal matrix ``R = diag(signs) (I kron H)``, H a normalized Hadamard
    matrix.

    :class:`BlockRotation` is the other kind, for rotations that are written into the weights and take blocks of any width.

    Attributes:
        block: channels in a block, a power of two that divides the number of channels K.
        signs: ``[K]`` of +1 and -1 in any dtype, by which channels are multiplied ahead of the Hadamard matrix. None for no
            signs.

    Raises:
        MethodError: ``block`` is no power of two.
    """

    block: int
    signs: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1 or self.block & (self.block - 1):
            raise MethodError(f"Rotation(block={self.block!r}): a Hadamard block is a power of two, as an int")

    def factors(self, k: int) -> Tensor:
        """``[k]`` float64: what k channels are multiplied by ahead of the additions: the signs over ``sqrt(block)``."""
        signs = torch.ones(k, dtype=torch.float32, device="cpu") if self.signs is None else self.signs
        return signs.double() / math.sqrt(self.block)

    def apply(self, x: Tensor) -> Tensor:
        """``x R`` for ``x [..., K]``, in the dtype of ``x``.

        It is computed in float64 for float64 and in float32 for every other dtype. Channels are multiplied by :meth:`factors`,
        and then pairs of channels that are 1, 2, 4, ..., ``block / 2`` apart become ``(a + b, a - b)``. This order of additions
        defines the bits of the result, which every backend has to meet; no token has an influence on another.

        Raises:
            MethodError: ``block`` does not divide K.
        """
        if x.shape[-1] % self.block:
            raise MethodError(f"Rotation(block={self.block}) does not divide {x.shape[-1]} channels")
        y = x if x.dtype == torch.float64 else x.float()
        y = y * self.factors(x.shape[-1]).to(y)
        stride = 1
        while stride < self.block:
            a, b = y.unflatten(-1, (-1, 2, stride)).unbind(-2)
            y = torch.stack([a + b, a - b], -2).flatten(-3)
            stride *= 2
        return y.to(x.dtype)


def hadamard(n: int) -> Tensor:
    """The normalized Hadamard matrix in Sylvester's order, ``[n, n]`` float64, for a power of two n.

    It is symmetric and its own inverse, and it is what :class:`Rotation` multiplies each block by.
    """
    h = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


@dataclass(frozen=True)
class BlockRotation:
    """A rotation that is written into weights: a block-diagonal orthogonal matrix R for blocks of any width.

    :class:`Rotation` is the other kind, which is applied at run time and therefore needs powers of two. Within a block, R is
    a product of four matrices:

    1. random signs on the diagonal;
    2. a Hadamard matrix for the largest power of two that divides ``width``;
    3. a Hartley matrix (``cos + sin``) for the odd number that is left, whose entries are at most ``sqrt(2 / odd)``, so that
       every channel goes to all others of its block in about equal parts;
    4. a reflection that takes the image of the all-ones vector back to the all-ones vector.

    Because of the reflection the mean over channels stays what it is. So a LayerNorm without gain commutes with R, as an
    RMSNorm without gain commutes with every orthogonal matrix.

    Attributes:
        width: channels in a block, any number from 1 up.
        seed: of the random signs.
        order: ``[n * width]`` int64: the channels of the first block, then those of the second, and so on. None for blocks of
            neighbouring channels.
    """

    width: int
    seed: int = 0
    order: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """``x R`` for ``x [..., n * width]``, every block of ``width`` channels by itself; float64, whatever ``x`` is."""
        random = torch.Generator().manual_seed(self.seed)
        signs = (
            (torch.randint(0, 2, (self.width,), generator=random, dtype=torch.int64, device="cpu") * 2.0 - 1)
            .double()
            .to(x.device)
        )
        axis = torch.full_like(signs, self.width**-0.5)
        normal = self._mix(axis * signs) - axis
        normal = normal / normal.norm().clamp_min(1e-300)  # all signs alike may leave nothing to reflect
        order = None if self.order is None else self.order.to(x.device)
        y = self._mix((x if order is None else x[..., order]).double().unflatten(-1, (-1, self.width)) * signs)
        y = (y - 2 * (y @ normal)[..., None] * normal).flatten(-2)
        return y if order is None else torch.empty_like(y).index_copy_(-1, order, y)

    def _mix(self, x: Tensor) -> Tensor:
        """``x [..., width]`` times the Hartley matrix of the odd part of ``width`` and the Hadamard matrix of the rest."""
        power = self.width & -self.width
        angle = torch.arange(self.width // power, dtype=torch.float64, device=x.device)
        angle = 2 * torch.pi * torch.outer(angle, angle) / len(angle)
        x = x.unflatten(-1, (power, -1)) @ ((angle.cos() + angle.sin()) / len(angle) ** 0.5)
        step = 1
        while step < power:
            a, b = x.unflatten(-2, (-1, 2, step)).unbind(-3)
            x = torch.stack([a + b, a - b], -3).flatten(-4, -2)
            step *= 2
        return x.flatten(-2) / power**0.5
