"""The kernels that make codes, as the door sees them: what each one takes, and how it is launched.

None of them changes a bit of what another one gives, but for the last bit of norms, gates and rotations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quantkit.core.numerics import qmax
from quantkit.ops.gpu.codes import portable, reached, shapes
from quantkit.ops.gpu.codes.request import Codes, CodesRequest, allocate
from quantkit.ops.gpu.devices import PROCESSORS, shared_memory, starts_early
from quantkit.ops.gpu.kernel import Kernel
from quantkit.ops.gpu.launch import lasting, launch
from quantkit.ops.gpu.layout import IN_PAIRS, ceil_div, power_of_two, reachable
from quantkit.ops.gpu.service import service

try:
    from quantkit.ops.gpu.codes import order, rows
except (ImportError, AttributeError) as error:
    service.take_gluon_out(str(error).splitlines()[0])

MMA_BITS = (0, 3, 4, 5)
"""Bits of a channel's number that the ``mma`` of :mod:`.rows` transforms: 0 and 5 select a register, 3 and 4 a thread."""


@functools.cache
def launch_options(warps: int, early: bool) -> dict[str, Any]:
    """What Triton is told besides the arguments: no fused multiply-add, since results are defined without it."""
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return options | {"launch_pdl": True} if early else options


class Portable(Kernel):
    """Every request, on any GPU: :mod:`.portable`."""

    name = "portable"
    request = CodesRequest
    handles = frozenset({
        "x", "bits", "symmetric", "source", "x2", "gain", "bias", "eps", "offset", "shift", "pre_scale", "permutation",
        "rotation", "side_index", "side_mask", "in_scale", "in_zero", "clusters", "shares", "align", "threshold", "warps",
    })  # fmt: skip

    def why_not(self, request: CodesRequest) -> str | None:
        return self.unhandled(request)

    def launch(self, request: CodesRequest) -> list[Tensor]:
        r, out = request, allocate(request)
        (m, k), early = r.x.shape, starts_early(r.x.device)
        marks = r.x.new_zeros(k, dtype=torch.int32) if r.threshold else None
        if m:
            self._run(r, out, marks, early)
        return out.given() if marks is None else [*out.given(), list_columns(marks, early and m > 0)]

    def _run(self, r: CodesRequest, out: Codes, marks: Tensor | None, early: bool) -> None:
        x, x2 = reachable(r.x), None if r.x2 is None else reachable(r.x2)
        (m, k), width, groups = x.shape, out.q.shape[1], r.groups
        places = k if r.clusters is None else width
        columns = 0 if r.side_index is None else r.side_index.shape[0]
        sides = 0 if out.side is None else out.side.shape[1]
        shape = shapes.portable(places, r.clusters is not None, r.warps)
        launch(
            portable.quantize_kernel, (ceil_div(m, shape.rows),),
            x, x2, r.gain, r.bias, r.shift, r.pre_scale, r.permutation, r.side_index, r.side_mask, r.in_scale, r.in_zero,
            r.clusters, r.shares, out.q, out.scale, out.zero, out.side, out.sum, marks, m, k, places, width, *x.stride(),
            *((0, 0) if x2 is None else x2.stride()), columns, sides, r.eps, r.offset, r.threshold, r.source, qmax(r.bits),
            r.symmetric, r.rotation, power_of_two(sides) if sides else 0, power_of_two(groups), groups,
            shape.rows, shape.block, shape.rows == 1 and shape.block == k == places, early,
            **launch_options(shape.warps, early),
        )  # fmt: skip


class Rows(Kernel):
    """Norms, gates, rotations and orders, one row at a time: :mod:`.rows`. Codes alone are not made faster by it."""

    name = "rows"
    request = CodesRequest
    handles = frozenset({
        "x", "bits", "source", "x2", "gain", "bias", "eps", "offset", "pre_scale", "permutation", "rotation", "clusters",
        "shares", "align",
    })  # fmt: skip

    def why_not(self, request: CodesRequest) -> str | None:
        r = request
        alone = r.x2 is None and r.gain is None and r.pre_scale is None and r.permutation is None
        if alone and not r.source and not r.rotation:
            return "the portable kernel makes codes alone as fast"
        if reason := self.unhandled(r):
            return reason
        if r.source == "rms" and r.bias is not None:
            return "an RMSNorm has no bias in it"
        m, k = r.x.shape
        places = r.places
        if r.clusters is not None and (r.align % max(shapes.LINE, r.rotation) or r.groups > shapes.MOST_GROUPS):
            return "groups do not begin at whole lines, or are too many"
        largest = shapes.LARGEST if alone and r.clusters is None else shapes.LARGEST // 2
        if k < shapes.LEAST or places > largest:
            return "rows are too short or too long"
        if r.rotation and not shapes.LEAST_ROTATION <= r.rotation <= shapes.LARGEST_ROTATION:
            return "blocks of the rotation are too short or too long"
        if r.x.stride(1) != 1 or not m:
            return "rows do not lie one behind the other"
        if r.x2 is not None:
            shape = self.shape(r, places)
            if shape.crowded and shape.bytes(r.x.element_size(), r.permutation is not None) > shared_memory(r.x.device):
                return "there is not enough shared memory"
        return None

    def shape(self, r: CodesRequest, places: int) -> shapes.Rows:
        """The shape of programs for this request."""
        vectors = r.gain is not None or r.pre_scale is not None or r.permutation is not None
        two, order = r.x2 is not None, r.permutation is not None
        return shapes.rows(
            places, r.rotation, r.x.shape[0], two=two, gate=two and not r.keeps_sum, order=order, vectors=vectors
        )

    def launch(self, request: CodesRequest) -> list[Tensor]:
        r, x, out = request, request.x, allocate(request)
        x2 = r.x2 if r.x2 is None or r.x2.stride(1) == 1 else r.x2.contiguous()
        (m, k), width, groups = x.shape, out.q.shape[1], r.groups
        shape = self.shape(r, r.places)
        enough = shape.bytes(x.element_size(), r.permutation is not None) <= shared_memory(x.device)
        ring = shape.ring and _copied(x, x2) and enough
        ahead = shape.ahead and not ring
        gate = x2 is not None and out.sum is None
        exact = (gate or not r.source) and r.pre_scale is None and x.dtype != torch.float32
        matrix = hadamard_16(r.rotation, x.device, x.dtype if exact else torch.bfloat16) if r.rotation else None
        early = starts_early(x.device)
        launch(
            rows.rows_kernel, (min(m, shape.programs) if ring or ahead else m,),
            x, x2, r.gain, r.bias, r.pre_scale, r.permutation, matrix, r.clusters, r.shares, out.q, out.scale, out.sum,
            m, k, width, x.stride(0), 0 if x2 is None else x2.stride(0), r.eps, r.offset, r.source, qmax(r.bits), r.rotation,
            power_of_two(groups), groups, shape.line, shape.block, shape.block == k, ahead,
            shapes.RING if ring else 0, gate and exact, early, **launch_options(shape.warps, early),
        )  # fmt: skip
        return out.given()


class Order(Kernel):
    """Channels put in order, after an RMSNorm or not, two rows at a time: :mod:`.order`."""

    name = "order"
    request = CodesRequest
    handles = frozenset({
        "x", "bits", "source", "x2", "gain", "eps", "offset", "pre_scale", "permutation", "clusters", "shares", "align",
    })  # fmt: skip

    def why_not(self, request: CodesRequest) -> str | None:
        r = request
        if r.permutation is None:
            return "there is no order to put channels in"
        if reason := self.unhandled(r):
            return reason
        if r.source not in ("", "rms"):
            return "it knows no norm but RMSNorm, and no gate"
        if r.clusters is not None and (r.align % shapes.LINE or r.groups > shapes.MOST_GROUPS):
            return "groups do not begin at whole lines, or are too many"
        m, k = r.x.shape
        if m <= (shapes.FEW if r.clusters is None else shapes.FEW_IN_GROUPS):
            return "so few rows are faster one at a time"
        if k < shapes.LEAST or r.places > IN_PAIRS:
            return "rows are too short or too long"
        if r.x.element_size() != 2 or r.x.stride(1) != 1:
            return "two rows do not fit one word of shared memory, or do not lie one behind the other"
        return None

    def launch(self, request: CodesRequest) -> list[Tensor]:
        r, x, out = request, request.x, allocate(request)
        x2 = r.x2 if r.x2 is None or r.x2.stride(1) == 1 else r.x2.contiguous()
        (m, k), width, groups = x.shape, out.q.shape[1], r.groups
        block = power_of_two(width)
        warps, early = shapes.order_warps(block), starts_early(x.device)
        launch(
            order.order_kernel, (min(ceil_div(m, 2), PROCESSORS * (16 // warps)),),
            x, x2, r.gain, r.pre_scale, r.permutation, r.clusters, r.shares, out.q, out.scale, out.sum, m, k, width,
            x.stride(0), 0 if x2 is None else x2.stride(0), r.eps, r.offset, r.source, qmax(r.bits),
            power_of_two(groups), groups, block, block == k == width, early, **launch_options(warps, early),
        )  # fmt: skip
        return out.given()


PORTABLE, ROWS, ORDER = Portable(), Rows(), Order()


def _copied(*rows: Tensor | None) -> bool:
    """Whether rows may be copied to shared memory, 16 bytes at a time."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 for t in rows if t is not None)


def list_columns(marks: Tensor, early: bool) -> Tensor:
    """``[1 + K]`` int32, how many of ``marks [K]`` int32 are 1 and which, ascending; what lies beyond is undefined."""
    k = len(marks)
    active, block = marks.new_empty(1 + k), 1024
    launch(
        reached.list_kernel, (max(ceil_div(k, block), 1),), marks, active, k, block, 4096, early,
        num_warps=8, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return active


@lasting
def hadamard_16(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[16, 16]``, the part of a Hadamard matrix that :data:`MMA_BITS` make up: bits beyond ``block`` stay as they are."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    for bit in reversed(MMA_BITS):
        one = (
            torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device="cpu")
            if 1 << bit < block
            else torch.eye(2, dtype=torch.float32, device="cpu")
        )
        matrix = torch.kron(matrix, one)
    return matrix.to(device, dtype)
