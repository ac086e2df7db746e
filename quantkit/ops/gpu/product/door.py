"""The way in to the kernels that multiply codes: the shape of a request decides which one runs it, at which setting."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError

from quantkit.core.errors import BackendError
from quantkit.ops.gpu import devices
from quantkit.ops.gpu.product import tiles
from quantkit.ops.gpu.product.kernels import HOPPER, PORTABLE, VECTOR
from quantkit.ops.gpu.product.request import ProductRequest
from quantkit.ops.gpu.product.tiles import Decode, Gemm, Tile
from quantkit.ops.gpu.product.tuned import tuned_config
from quantkit.ops.gpu.service import service


def multiply(request: ProductRequest) -> Tensor:
    """``[M, N]`` of ``request.dtype``.

    Raises:
        BackendError: no kernel handles what is asked for.
    """
    r, (m, k), n = request, request.q.shape, request.weight.shape[0]
    if m == 1 and VECTOR.why_not(r) is None:
        return VECTOR.launch(r, choose_vector(r))
    device, in_groups = r.q.device, r.borders is not None
    tma = devices.capability(device) == 90 and service.runs(HOPPER.name) and HOPPER.why_not(r) is None
    config = choose(device, m, n, k, tma=tma, in_groups=in_groups)
    if not isinstance(config, Tile):
        try:
            return HOPPER.launch(r, config)
        except CompilationError as error:
            service.take_gluon_out(str(error).strip().splitlines()[-1])
            config = tiles.portable(devices.capability(device), m, n, in_groups=in_groups)
    if reason := PORTABLE.why_not(r):
        raise BackendError(f"no kernel makes this product: {reason}")
    return PORTABLE.launch(r, config)


def choose_vector(request: ProductRequest) -> tiles.Vector:
    """The setting for one token. Only tokens in floating point are tuned."""
    r, k = request, request.q.shape[1]
    if r.sx is not None:
        return tiles.vector(k, given=True, in_groups=r.borders is not None)
    config = tuned_config(r.q.device, 1, *r.weight.shape)
    return config if isinstance(config, tiles.Vector) else tiles.vector(k)


def choose(device: torch.device, m: int, n: int, k: int, *, tma: bool = False, in_groups: bool = False) -> Tile | Gemm | Decode:
    """The kernel for codes ``[m, k] x [n, k]^T``, the same bits whichever it is.

    Args:
        tma: the operands obey the rules of Hopper's kernels, which are in service.
        in_groups: groups of channels have multipliers of their own.
    """
    if not in_groups:
        config = tuned_config(device, m, n, k)
        # few tokens in a Gemm: the next larger number that was tuned is far away, and the table knows better
        if isinstance(config, Tile) or (tma and isinstance(config, Decode if m <= 64 else Gemm | Decode)):
            return config
    arch = devices.capability(device)
    return tiles.hopper(m, n, in_groups=in_groups) if arch == 90 and tma else tiles.portable(arch, m, n, in_groups=in_groups)
