"""What is asked of the kernels that turn activations into INT8 codes, as one value, and what they give back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.ops.gpu.layout import padded, padded_side, scale_columns

NORMS = ("rms", "layer")
GATES = ("silu", "gelu", "gelu_tanh")


class CodesRequest(NamedTuple):
    """Codes of ``x``, each token on its own: (norm or gate,) shift, pre-scale, permutation, rotation, scale, codes.

    The fields are called as the arguments of the operator ``quantkit::quantize``, which compiled graphs keep. A named tuple,
    because one is made in every call, and a frozen dataclass takes twice as long to make.

    Attributes:
        x: ``[M, K]`` float, any strides.
        bits, symmetric: number format of the codes.
        source: "" for x itself, "rms" or "layer" for a norm of x, or of x + x2, "silu", "gelu" or "gelu_tanh" for that
            function of x, times x2.
        x2: ``[M, K]``: the residual that is added in front of a norm, or the other factor of a gate.
        gain, bias, eps, offset: of the norm, ``norm(x) * (gain + offset) + bias``.
        shift: ``[K]`` float32, subtracted from x.
        pre_scale: ``[K]`` float32, by which channels are multiplied, the signs of a rotation included.
        permutation: ``[K]`` whole numbers: which channel of x a code is of. With groups ``[P]``, -1 where a code is padding.
        rotation: channels of a block of the Hadamard rotation; 0 for none.
        side_index: ``[n]`` int64, channels that are given back after the shift, with NaN for infinities, for the side product.
        side_mask: ``[K]`` int8, 1 at the channels of ``side_index``, which are 0 in the codes.
        in_scale, in_zero: static scale ``[1]`` (with G groups ``[1 + G]``, base scale and multipliers) and zero point ``[1]``
            (``[G]`` int32); left out, each token gets its own.
        clusters: with G > 1 groups of channels, ``[P / 16]`` int32: to which of them each 16 of the P codes of a row belong.
        shares: ``[G]`` float32 with groups, see :func:`quantkit.core.groups.shares`.
        align: a number that divides every place where a group begins.
        threshold: finite elements that reach it are 0 in the codes, and do not count for the scale; 0 for none.
        warps: of each program; 0 decides by K.
    """

    x: Tensor
    bits: int = 8
    symmetric: bool = True
    source: str = ""
    x2: Tensor | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0
    shift: Tensor | None = None
    pre_scale: Tensor | None = None
    permutation: Tensor | None = None
    rotation: int = 0
    side_index: Tensor | None = None
    side_mask: Tensor | None = None
    in_scale: Tensor | None = None
    in_zero: Tensor | None = None
    clusters: Tensor | None = None
    shares: Tensor | None = None
    align: int = 16
    threshold: float = 0.0
    warps: int = 0

    @property
    def groups(self) -> int:
        """How many groups of channels have scales of their own; 1 where all channels share one."""
        return 1 if self.clusters is None or self.shares is None else self.shares.shape[0]

    @property
    def places(self) -> int:
        """Codes of a row that stand for something: K, or with groups P, the padding between them included."""
        return self.x.shape[1] if self.clusters is None else 16 * self.clusters.shape[0]

    @property
    def keeps_sum(self) -> bool:
        """Whether ``x + x2`` is given back."""
        return self.x2 is not None and self.source in NORMS


class Codes(NamedTuple):
    """Outputs of a request, allocated by :func:`allocate`; what was not asked for is None.

    Attributes:
        q: ``[M, padded(K)]`` int8, or with groups ``[M, P]``. The weight must be 0 where they are padding.
        scale: ``[M, 1]`` float32, or with groups ``[M, 1 + G]``, base scale and multipliers.
        zero: ``[M, G]`` int32, the zero points where they are dynamic.
        side: ``[M, padded_side(n)]`` in the dtype of x, the channels of ``side_index``.
        sum: ``[M, K]`` in the dtype of x, ``x + x2``.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    side: Tensor | None
    sum: Tensor | None

    def given(self) -> list[Tensor]:
        """Those that there are, as the operator returns them."""
        return [tensor for tensor in self if tensor is not None]


def allocate(request: CodesRequest) -> Codes:
    """Memory for the outputs of ``request``, not yet written. Works with fake tensors as well."""
    x, index = request.x, request.side_index
    m, k = x.shape
    width, groups = (padded(k), 1) if request.clusters is None else (request.places, request.groups)
    return Codes(
        x.new_empty((m, width), dtype=torch.int8),
        x.new_empty((m, scale_columns(groups)), dtype=torch.float32),
        None if request.symmetric or request.in_scale is not None else x.new_empty((m, groups), dtype=torch.int32),
        None if index is None or not index.shape[0] else x.new_empty((m, padded_side(index.shape[0]))),
        x.new_empty((m, k)) if request.x2 is not None and request.keeps_sum else None,
    )
