"""The GPU kernels as PyTorch operators: traced whole by ``torch.compile``, captured by CUDA graphs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError

from quantkit.ops.gpu import columns, configs, fuse
from quantkit.ops.gpu.gemv import gemv as _gemv
from quantkit.ops.gpu.matmul import matmul as _matmul
from quantkit.ops.gpu.quantize import quantize as _quantize
from quantkit.ops.gpu.quantize import reachable, with_unit

log = logging.getLogger("quantkit")
OTHER_GLUON = (
    "this Triton's Gluon is another than quantkit knows (%s): the portable kernels run instead, up to 1.3 times slower"
)

try:
    from quantkit.ops.gpu import hopper as hopper
    from quantkit.ops.gpu import order as order
    from quantkit.ops.gpu import rows as rows
except (ImportError, AttributeError) as error:  # Gluon is experimental: its names move from one Triton to the next
    hopper = order = rows = None  # type: ignore[assignment]
    log.warning(OTHER_GLUON, str(error).splitlines()[0])

SIXTEEN = (torch.bfloat16, torch.float16)


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
    """See :func:`quantkit.ops.gpu.quantize.quantize`; the kernels of :mod:`.order` and :mod:`.rows` where they apply."""
    for special in (order, rows):
        if special is not None and x.device.type == "cuda" and special.takes(x, **options):
            try:
                return special.quantize(x, **options)
            except CompilationError as error:
                _do_without_gluon(error)
                break
    return _quantize(x, **options)


@on_its_device
def matmul(
    q: Tensor,
    sx: Tensor,
    weight: Tensor,
    sw: Tensor,
    dtype: torch.dtype,
    zero: Tensor | None = None,
    wsum: Tensor | None = None,
    bias: Tensor | None = None,
    side: Tensor | None = None,
    side_weight: Tensor | None = None,
    borders: Tensor | None = None,
    align: int = 16,
    active: Tensor | None = None,
) -> Tensor:
    """``[M, N]`` of ``dtype``; arguments as :func:`quantkit.ops.gpu.matmul.matmul`, with the kernel chosen by the shape.

    ``align`` is what all borders are multiples of.
    """
    (m, k), n = q.shape, len(weight)
    if m == 1 and zero is None and side is None and k % 16 == 0:
        vector = configs.vector(k, given=True, segments=borders is not None)
        return _gemv(q, weight, sw, sx=sx, dtype=dtype, bias=bias, borders=borders, config=vector)
    tma = hopper is not None and k % 16 == 0 and (weight.data_ptr() | q.data_ptr()) % 16 == 0 and m > 0 and n > 0
    tma = tma and (borders is None or align % configs.BLOCK == 0) and (m <= 64 or (n % 8 == 0 and dtype in SIXTEEN))
    if side is not None:
        tma = tma and (active is not None or side.shape[1] % configs.SIDE == 0) and side.dtype in SIXTEEN
    if active is not None:
        assert side is not None
        side = reachable(side)
    config = configs.choose(q.device, m, n, k, tma=tma, segments=borders is not None)
    if not isinstance(config, configs.Tile):
        try:
            if active is None or side is None:
                return hopper.multiply(
                    q, sx, weight, sw, dtype, zero=zero, wsum=wsum, bias=bias, side=side, side_weight=side_weight,
                    borders=borders, config=config,
                )  # fmt: skip
            some = columns.gather(side, q, sx, weight, sw, active)
            y = hopper.multiply(
                q, sx, weight, sw, dtype, bias=bias, side=some[0], side_weight=some[1], active=active, config=config
            )
            tile = configs.portable(configs.capability(q.device), m, n, segments=True)
            return _matmul(q, sx, weight, sw, dtype, bias=bias, side=side, active=active, done=y, config=tile)
        except CompilationError as error:
            _do_without_gluon(error)
            config = configs.portable(configs.capability(q.device), m, n)
    return _matmul(
        q, sx, weight, sw, dtype, zero=zero, wsum=wsum, bias=bias, side=side, side_weight=side_weight, borders=borders,
        active=active, config=config,
    )  # fmt: skip


def _do_without_gluon(error: Exception) -> None:
    global hopper, order, rows
    hopper = order = rows = None  # type: ignore[assignment]
    log.warning(OTHER_GLUON, str(error).strip().splitlines()[-1])


@on_its_device
def gemv(
    x: Tensor, weight: Tensor, sw: Tensor, bits: int = 8, bias: Tensor | None = None, pre_scale: Tensor | None = None
) -> Tensor:
    """``[1, N]`` from one float token ``x [1, K]``; see :func:`quantkit.ops.gpu.gemv.gemv`."""
    tuned = configs.tuned_config(x.device, 1, *weight.shape)
    config = tuned if isinstance(tuned, configs.Vector) else configs.vector(x.shape[1])
    return _gemv(x, weight, sw, bits=bits, bias=bias, pre_scale=pre_scale, config=config)


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
def _(
    x, *, symmetric=True, source="", x2=None, side_index=None, in_scale=None, clusters=None, shares=None, threshold=0.0, **_
):  # fmt: skip
    m, k = x.shape
    width, count = (configs.padded(k), 1) if clusters is None else (16 * len(clusters), len(shares))
    out = [x.new_empty((m, width), dtype=torch.int8), x.new_empty((m, with_unit(count)), dtype=torch.float32)]
    out += [] if symmetric or in_scale is not None else [x.new_empty((m, count), dtype=torch.int32)]
    out += [] if side_index is None else [x.new_empty((m, configs.padded_side(len(side_index))))]
    out += [x.new_empty((m, k))] if x2 is not None and source in ("rms", "layer") else []
    return out + ([x.new_empty(1 + k, dtype=torch.int32)] if threshold else [])


@torch.library.register_fake("quantkit::matmul")
def _(q, sx, weight, sw, dtype, *_, **__):
    return q.new_empty((q.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("quantkit::gemv")
def _(x, weight, *_, **__):
    return x.new_empty((1, weight.shape[0]))


fuse.install()
