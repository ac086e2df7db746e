"""The GPU kernels as PyTorch operators: traced whole by ``torch.compile``, captured by CUDA graphs.

Each operator makes one request of its flat arguments and hands it to the door of its side, :mod:`.codes.door` or
:mod:`.product.door`. Names and arguments of operators stay as they are: Inductor's cache on disk knows graphs by them, so that
other arguments need another name.

Importing this module imports Triton, registers the operators, and installs the graph pass of :mod:`.fuse` with Inductor, which
is a setting of the whole process. So it is imported when the operators are first needed, and never by ``import quantkit``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantkit.ops.gpu import fuse
from quantkit.ops.gpu.codes.door import make_codes
from quantkit.ops.gpu.codes.request import CodesRequest, allocate
from quantkit.ops.gpu.product.door import multiply
from quantkit.ops.gpu.product.request import ProductRequest


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; make it that of the first argument."""

    @functools.wraps(function)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
            return function(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return function(x, *args, **kwargs)

    return call


@on_its_device
def quantize(x: Tensor, **options: Any) -> list[Tensor]:
    """INT8 codes of rows; ``options`` are the other fields of :class:`.codes.request.CodesRequest`, and nothing else."""
    return make_codes(CodesRequest(x, **options))


@on_its_device
def matmul(q: Tensor, sx: Tensor, weight: Tensor, sw: Tensor, dtype: torch.dtype, *args: Any, **options: Any) -> Tensor:
    """``[M, N]`` of ``dtype``; the others are the next fields of :class:`.product.request.ProductRequest`, in their order."""
    return multiply(ProductRequest(q, sx, weight, sw, dtype, *args, **options))


@on_its_device
def gemv(
    x: Tensor, weight: Tensor, sw: Tensor, bits: int = 8, bias: Tensor | None = None, pre_scale: Tensor | None = None
) -> Tensor:
    """``[1, N]`` in the dtype of one token ``x [1, K]`` in floating point, which is quantized to ``bits`` on the way in."""
    return multiply(ProductRequest(x, None, weight, sw, x.dtype, bias=bias, bits=bits, pre_scale=pre_scale))


_library = torch.library.Library("quantkit", "FRAGMENT")
_library.define(
    "quantize(Tensor x, *, int bits=8, bool symmetric=True, str source='', Tensor? x2=None, Tensor? gain=None, "
    "Tensor? bias=None, float eps=0.0, float offset=0.0, Tensor? shift=None, Tensor? pre_scale=None, "
    "Tensor? permutation=None, int rotation=0, Tensor? side_index=None, Tensor? side_mask=None, "
    "Tensor? in_scale=None, Tensor? in_zero=None, Tensor? clusters=None, Tensor? shares=None, int align=16, "
    "float threshold=0.0) -> Tensor[]"
)
_library.define(
    "matmul(Tensor q, Tensor sx, Tensor weight, Tensor sw, ScalarType dtype, Tensor? zero=None, Tensor? wsum=None, "
    "Tensor? bias=None, Tensor? side=None, Tensor? side_weight=None, Tensor? borders=None, "
    "int align=16, Tensor? active=None) -> Tensor"
)
_library.define("gemv(Tensor x, Tensor weight, Tensor sw, int bits=8, Tensor? bias=None, Tensor? pre_scale=None) -> Tensor")
for _name, _function in (("quantize", quantize), ("matmul", matmul), ("gemv", gemv)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("quantkit::quantize")
def _(x, **options):
    out = allocate(CodesRequest(x, **options)).given()
    return [*out, x.new_empty(1 + x.shape[1], dtype=torch.int32)] if options.get("threshold") else out


@torch.library.register_fake("quantkit::matmul")
def _(q, sx, weight, sw, dtype, *_, **__):
    return q.new_empty((q.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("quantkit::gemv")
def _(x, weight, *_, **__):
    return x.new_empty((1, weight.shape[0]))


fuse.install()
