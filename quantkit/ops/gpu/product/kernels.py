"""The kernels that multiply codes, as the door sees them: what each one takes, and how it is launched.

All of them give the same bits, but for the order in which the side product adds up.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quantkit.core.numerics import qmax
from quantkit.ops.gpu.devices import PROCESSORS, capability, processors, starts_early
from quantkit.ops.gpu.kernel import Kernel
from quantkit.ops.gpu.launch import launch
from quantkit.ops.gpu.layout import BLOCK, SIDE, ceil_div, power_of_two, reachable
from quantkit.ops.gpu.product import columns, portable, tiles, vector
from quantkit.ops.gpu.product.request import ProductRequest
from quantkit.ops.gpu.product.tiles import Decode, Gemm, Tile
from quantkit.ops.gpu.service import service

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantkit.ops.gpu.product import few, many

    TYPES = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
except (ImportError, AttributeError) as error:
    service.take_gluon_out(str(error).splitlines()[0])

SIXTEEN = (torch.bfloat16, torch.float16)


class Vector(Kernel):
    """One token, as codes or in floating point: :mod:`.vector`."""

    name = "vector"
    request = ProductRequest
    handles = frozenset({"q", "sx", "weight", "sw", "dtype", "bias", "borders", "align", "bits", "pre_scale"})

    def why_not(self, request: ProductRequest) -> str | None:
        r = request
        m, k = r.q.shape
        if m != 1:
            return "it multiplies one token"
        if reason := self.unhandled(r):
            return reason
        if r.sx is None:
            return None if r.borders is None else "a token in floating point has one scale"
        if k % 16:
            return "rows of codes are not padded"
        return None if r.bits == 8 and r.pre_scale is None else "bits and pre_scale are of tokens in floating point"

    def launch(self, request: ProductRequest, config: tiles.Vector) -> Tensor:
        r, (n, width), rows = request, request.weight.shape, config.rows * config.groups
        words, x, y = width // 4, reachable(r.q), r.q.new_empty((1, n), dtype=r.dtype)
        early, block = starts_early(x.device), power_of_two(words)
        launch(
            vector.gemv_kernel, (ceil_div(n, rows),),
            x if r.sx is None else x.view(torch.int32), r.sx, r.weight.view(torch.int32), y, r.sw, r.bias, r.pre_scale,
            r.borders, n, x.shape[1], words, x.stride(1), r.groups, r.sw.dim() == 2, qmax(r.bits), config.rows,
            config.groups, block, n % rows == 0, block == words, x.device.type == "cuda", early,
            num_warps=config.warps, enable_fp_fusion=False, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
        return y


class Portable(Kernel):
    """Codes of any number of tokens on any GPU: :mod:`.portable`."""

    name = "portable"
    request = ProductRequest
    handles = frozenset({
        "q", "sx", "weight", "sw", "dtype", "zero", "wsum", "bias", "side", "side_weight", "borders", "align", "active",
    })  # fmt: skip

    def why_not(self, request: ProductRequest) -> str | None:
        return "it multiplies codes" if request.sx is None else self.unhandled(request)

    def launch(self, request: ProductRequest, config: Tile, done: Tensor | None = None) -> Tensor:
        """The product; where it is ``done [M, N]``, it is made again if more than ``columns.ROOM`` columns are active."""
        r, (m, k), n = request, request.q.shape, request.weight.shape[0]
        y = r.q.new_empty((m, n), dtype=r.dtype) if done is None else done
        if not m or not n:
            return y
        side = r.side if r.side is None or r.active is None else reachable(r.side)
        count = ceil_div(m, config.m) * ceil_div(n, config.n)
        launch(
            portable.matmul_kernel, (count if done is None else min(count, 2 * PROCESSORS),),
            r.q, r.weight, y, r.sx, r.sw, r.zero, r.wsum, r.bias, side, r.side_weight, r.borders, r.active, m, n, k,
            r.zero_stride, 0 if side is None else side.shape[1], *((0, 0) if side is None else side.stride()), r.groups,
            r.sw.dim() == 2, config.m, config.n, config.k, config.group, k % config.k == 0,
            0 if done is None else columns.ROOM,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
            **({} if done is None else {"launch_pdl": True}),
        )  # fmt: skip
        return y


class Hopper(Kernel):
    """Codes on Hopper, in Gluon: :mod:`.many` and :mod:`.few` tokens. Rows have to obey the rules of TMA, see :mod:`.ring`.

    Of ``active`` columns they add as many as ``columns.ROOM``. What has more goes through the portable kernel again.
    """

    name = "hopper"
    request = ProductRequest
    handles = Portable.handles

    def why_not(self, request: ProductRequest) -> str | None:
        r, (m, k), n = request, request.q.shape, request.weight.shape[0]
        if r.sx is None:
            return "it multiplies codes"
        if reason := self.unhandled(r):
            return reason
        if not m or not n:
            return "there is nothing to multiply"
        if k % 16 or (r.weight.data_ptr() | r.q.data_ptr()) % 16:
            return "rows of codes do not start at whole 16 bytes"
        if r.borders is not None and r.align % BLOCK:
            return "groups do not start at whole slots of the ring"
        if m > 64 and (n % 8 or r.dtype not in SIXTEEN):
            return "rows of the result are not whole 16 bytes of 16-bit numbers"
        if r.side is not None and r.side.dtype not in SIXTEEN:
            return "side columns are not in 16 bit"
        if r.active is None:
            return "side columns are not padded" if r.side is not None and r.side.shape[1] % SIDE else None
        others = (r.zero, r.wsum, r.side_weight, r.borders)
        return None if all(v is None for v in others) else "beside active columns it handles a bias only"

    def launch(self, request: ProductRequest, config: Gemm | Decode) -> Tensor:
        if request.active is None or request.side is None:
            return self._run(request, config)
        r, m, n = request._replace(side=reachable(request.side)), request.q.shape[0], request.weight.shape[0]
        xs, ws = gather(r)
        y = self._run(r._replace(side=xs, side_weight=ws), config)
        return PORTABLE.launch(r, tiles.portable(capability(r.q.device), m, n, in_groups=True), done=y)

    def _run(self, r: ProductRequest, config: Gemm | Decode) -> Tensor:
        """``[M, N]`` of a 16-bit dtype (any float with :class:`Decode`); ``active`` says how many side columns there are."""
        (m, k), n = r.q.shape, r.weight.shape[0]
        y = r.q.new_empty((m, n), dtype=r.dtype)
        groups, by_row, stride = r.groups, r.sw.dim() == 2, r.zero_stride
        sides = 0 if r.side is None else r.side.shape[1] // SIDE
        options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": config.early}
        pointers = (r.sx, r.sw, r.zero, r.wsum, r.bias, r.active, r.borders, m, n, k, stride)
        if isinstance(config, Gemm):
            count = ceil_div(m, 128) * ceil_div(n, config.columns)
            launch(
                many.gemm_kernel, (min(processors(r.q.device), count),),
                described(r.q, 64, config.block_k), described(r.weight, config.part, config.block_k),
                *described_sides(r, 64, config.part), described(y, 64, config.width), *pointers,
                config.group, config.columns, config.block_k, config.stages, config.width,
                2 if r.bias is None and r.zero is None else 1, sides, groups, by_row, config.early, **options,
            )  # fmt: skip
        else:
            across = ceil_div(m, config.tokens)
            staged = config.staged and n % 8 == 0 and r.dtype in TYPES
            launch(
                few.decode_kernel, (across, max(1, min(processors(r.q.device) // across, ceil_div(n, 64)))),
                described(r.q, config.tokens, BLOCK), described(r.weight, 64, BLOCK),
                *described_sides(r, config.tokens, 64), described(y, config.tokens, 64) if staged else None, y, *pointers,
                config.tokens, config.block_k, config.stages, sides, groups, by_row, config.early,
                maxnreg=config.registers(groups), **options,
            )  # fmt: skip
        return y


VECTOR, PORTABLE, HOPPER = Vector(), Portable(), Hopper()


def kernel_of(config: tiles.Config) -> Vector | Portable | Hopper:
    """The kernel that these settings are of."""
    return VECTOR if isinstance(config, tiles.Vector) else PORTABLE if isinstance(config, Tile) else HOPPER


@functools.cache
def box(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], TYPES[dtype])


def described(tensor: Tensor, rows: int, columns: int) -> Any:
    """What TMA needs to know of a contiguous matrix that is moved in boxes of ``rows x columns``."""
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), [rows, columns], box(rows, columns, tensor.dtype))


def described_sides(r: ProductRequest, rows: int, weight_rows: int) -> tuple[Any, Any]:
    """The same of the side columns of tokens and weight, in boxes of so many rows."""
    if r.side is None or r.side_weight is None:
        return None, None
    return described(r.side, rows, SIDE), described(r.side_weight, weight_rows, SIDE)


def gather(r: ProductRequest) -> tuple[Tensor, Tensor]:
    """Side operands ``[M, ROOM]`` and ``[N, ROOM]`` in the dtype of ``side [M, K]``, as far as columns are active."""
    x, n = r.side, len(r.weight)
    assert x is not None
    m, k = r.q.shape
    xs, ws = x.new_empty((m, columns.ROOM)), x.new_empty((n, columns.ROOM))
    launch(
        columns.gather_kernel, (ceil_div(m, columns.ROWS) + ceil_div(n, columns.ROWS),),
        x, r.q, r.sx, r.weight, r.sw, r.active, xs, ws, m, n, k, *x.stride(), columns.ROOM, SIDE, columns.ROWS,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return xs, ws
