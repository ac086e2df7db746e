"""GPUs with INT8 Tensor Cores, through Triton: quantize, multiply and rescale in two launches, or in one for one token."""

from __future__ import annotations

import importlib.util
import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.core.errors import BackendError
from quantkit.core.numerics import shared
from quantkit.ops.gpu.configs import BLOCK, IN_PAIRS, capability, padded, padded_side
from quantkit.ops.plain import Plain, shares_of
from quantkit.ops.reference import row_sums

if TYPE_CHECKING:
    from quantkit.layers.linear import W8A8Linear


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class GPUPacked:
    """A weight ready to run: ``codes`` in rows of 16; ``vector`` says whether one token may take the fused kernel.

    With clusters of channels, each starts at a multiple of 16 of the P places in a row: ``permutation [P]`` says which channel
    is where, -1 where none is, ``borders [G + 1]`` int32 where clusters begin, all at multiples of ``align``, and ``clusters
    [P / 16]`` int32 whose 16 places are, with their ``shares [G]``; ``in_scale``, if static, is then ``[1 + G]``, and
    ``scale`` is ``[1 + G, N]`` unless all multiples are 1. ``permutation`` is always as :func:`narrow` makes it.
    """

    backend: Any
    device: torch.device
    weight: Tensor
    codes: Tensor
    scale: Tensor
    sums: Tensor | None
    side_weight: Tensor | None
    side_mask: Tensor | None
    pre_scale: Tensor | None
    permutation: Tensor | None
    borders: Tensor | None
    clusters: Tensor | None
    shares: Tensor | None
    in_scale: Tensor | None
    align: int
    vector: bool


@torch.compiler.assume_constant_result  # the search for Triton cannot be traced
def why_not(device: torch.device) -> str | None:
    """None if the kernels run on ``device``, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's own interpreter: any device, very slow, for tests
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (A100) or newer"
    return None


class GPU(Plain):
    """See the module."""

    name = "triton"

    def why_not(self, device: torch.device) -> str | None:
        return why_not(device)

    def pack(self, layer: W8A8Linear) -> GPUPacked:
        k = layer.in_features
        weight, permutation = layer.weight.contiguous(), layer.permutation
        borders = clusters = None
        scale = (layer.weight_scale.t() if _by_row(layer.weight_scale) else layer.weight_scale[:, 0]).contiguous()
        shares, in_scale = shares_of(layer), layer.input_scale
        align = _align(layer.groups, layer.weight.device)
        if layer.groups:
            free = permutation if align == BLOCK and not layer.rotation_block else None
            borders, clusters, places = places_of(layer.groups, align, free, weight.device)
            assert shares is not None
            in_scale = None if in_scale is None else shared(in_scale, shares)
            width = 16 * len(clusters)
            weight = weight.new_zeros(len(weight), width).index_copy_(1, places, weight)
            if permutation is not None or width > k:
                order = torch.arange(k, device=weight.device) if permutation is None else permutation
                permutation = torch.full((width,), -1, device=weight.device).index_copy_(0, places, order)
        elif padded(k) != k:
            weight = torch.nn.functional.pad(weight, (0, padded(k) - k))
        side, mask = layer.outlier_weight, None
        if side is not None and layer.outlier_index is not None:
            mask = torch.zeros(k, dtype=torch.int8, device=side.device).index_fill(0, layer.outlier_index, 1)
            side = torch.nn.functional.pad(side, (0, padded_side(side.shape[1]) - side.shape[1])).contiguous()
        if permutation is not None:
            permutation = narrow(permutation, k)
        rest = (layer.shift, layer.permutation, layer.outlier_index)
        vector = layer.scheme.symmetric and not layer.scheme.is_static and not layer.rotation_block and not layer.groups
        sums = None if layer.scheme.symmetric else row_sums(layer.weight, layer.groups)
        return GPUPacked(
            self, layer.weight.device, layer.weight, weight, scale, sums,
            side, mask, _signed_scale(layer), permutation, borders, clusters, shares, in_scale, align,
            vector and not layer.threshold and all(v is None for v in rest),
        )  # fmt: skip

    def linear(self, layer: W8A8Linear, x: Tensor) -> Tensor:
        packed, scheme = layer.packed, layer.scheme
        if x.dtype not in DTYPES or not packed.codes.numel():
            return super().linear(layer, x)
        ops = kernels()  # also under torch.compile: it registers the operators
        if torch.compiler.is_compiling():
            ops = torch.ops.quantkit
        if x.shape[0] == 1 and packed.vector:
            return ops.gemv(x, packed.codes, packed.scale, scheme.activation_bits, layer.bias, packed.pre_scale)
        if layer.threshold:
            q, scale, active = ops.quantize(x, bits=scheme.activation_bits, threshold=layer.threshold)
            return ops.matmul(q, scale, packed.codes, packed.scale, x.dtype, bias=layer.bias, side=x, active=active)
        out = ops.quantize(
            x, bits=scheme.activation_bits, symmetric=scheme.symmetric, shift=layer.shift, pre_scale=packed.pre_scale,
            permutation=packed.permutation, rotation=layer.rotation_block, side_index=layer.outlier_index,
            side_mask=packed.side_mask, in_scale=packed.in_scale, in_zero=layer.input_zero_point, clusters=packed.clusters,
            shares=packed.shares, align=packed.align,
        )  # fmt: skip
        q, scale = out[:2]
        zero = out[2] if not scheme.symmetric and not scheme.is_static else layer.input_zero_point
        side = (None, None) if packed.side_weight is None else (out[-1], packed.side_weight.to(x.dtype))
        return ops.matmul(
            q, scale, packed.codes, packed.scale, x.dtype, zero, packed.sums, layer.bias, *side, packed.borders,
            packed.align,
        )  # fmt: skip


@torch.compiler.assume_constant_result  # which values they have cannot be traced
def _by_row(scale: Tensor) -> bool:
    """Whether clusters count differently in rows of a weight, of ``scale [N, 1 + G]``."""
    return bool((scale[:, 1:] != 1).any())


def narrow(permutation: Tensor, k: int) -> Tensor:
    """Of ``k`` channels, for the kernels: every program reads all of it."""
    return permutation.to(torch.int16 if k <= 2**15 else torch.int32)


def _align(groups: tuple[int, ...], device: torch.device) -> int:
    """To how many places clusters are padded: to slots of Hopper's ring, unless that made rows an eighth longer."""
    whole = sum(-(-size // BLOCK) * BLOCK for size in groups)
    return BLOCK if device.type == "cuda" and capability(device) == 90 and whole <= 1.125 * sum(groups) else 16


def places_of(
    groups: tuple[int, ...], align: int, channels: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Where clusters begin in a row of codes ``[G + 1]``, whose 16 places are ``[P / 16]``, and where channels go ``[K]``.

    Their order within a cluster is free where ``channels [K]`` are gathered anyway.
    """
    widths = [-(-size // align) * align for size in groups]
    starts = [0, *itertools.accumulate(widths)]
    clusters = [number for number, width in enumerate(widths) for _ in range(width // 16)]
    places = [torch.arange(start, start + size) for start, size in zip(starts[:-1], groups, strict=True)]
    if channels is not None:
        pairs = starts[-1] <= IN_PAIRS
        places = [spread(*part, pairs=pairs) for part in zip(places, channels.cpu().split(groups), strict=True)]
    borders, of_tiles = (torch.tensor(values, dtype=torch.int32, device=device) for values in (starts, clusters))
    return borders, of_tiles, torch.cat(places).to(device)


BANKS = 32


def spread(places: Tensor, channels: Tensor, *, pairs: bool) -> Tensor:
    """``places [n]`` in an order in which threads that read ``channels [n]`` at once read different banks of shared memory.

    A warp of :mod:`.rows` reads channels of 16 bit for 32 places that differ in their bits 3, 4, 6, 7 and 8, one of
    :mod:`.order` those of two rows, ``pairs`` of 32 bit, for places that differ in their bits 3 to 7.
    """
    lanes, size = (0b0_1111_1000, 1) if pairs else (0b1_1101_1000, 2)
    waiting: list[list[int]] = [[] for _ in range(BANKS)]
    for i, channel in enumerate(channels.tolist()):
        waiting[channel // size % BANKS].append(i)
    together: dict[int, list[int]] = {}
    for place in places.tolist():
        together.setdefault(place & ~lanes, []).append(place)
    out = torch.empty_like(places)
    for group in together.values():
        while group:  # once, but where fewer banks than places are left
            for bank in sorted(waiting, key=len, reverse=True)[: len(group)]:
                if bank:
                    out[bank.pop()] = group.pop()
    return out


def _signed_scale(layer: W8A8Linear) -> Tensor | None:
    """Pre-scale and signs of the rotation in one vector ``[K]``, in the channels of the input."""
    signs = layer.rotation_signs
    if signs is not None and layer.permutation is not None:
        signs = torch.empty_like(signs).index_copy_(0, layer.permutation, signs)
    if layer.pre_scale is None or signs is None:
        return signs if layer.pre_scale is None else layer.pre_scale
    return layer.pre_scale * signs


def tunable(device: str | torch.device) -> torch.device:
    """The GPU of this name, with its index.

    Raises:
        BackendError: there is none, or none that the kernels run on.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"{device!r} is no device: {str(error).splitlines()[0]}") from None
    if found.type != "cuda" or not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"cannot tune for {device}: it is no NVIDIA GPU of this machine")
    found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    if reason := why_not(found):
        raise BackendError(f"cannot tune for {device}: {reason}")
    return found


@torch.compiler.assume_constant_result
def kernels() -> Any:
    """The module of operators; imports Triton, which takes a second, only where there is a GPU to use it."""
    from quantkit.ops.gpu import operators

    return operators
