"""The way in to the kernels that make codes: a request is checked, and the first kernel that takes it runs it."""

from __future__ import annotations

from torch import Tensor
from triton.compiler.errors import CompilationError

from quantkit.core.errors import BackendError
from quantkit.ops.gpu.codes.kernels import ORDER, PORTABLE, ROWS
from quantkit.ops.gpu.codes.request import GATES, NORMS, CodesRequest
from quantkit.ops.gpu.service import service

IN_GLUON = (ORDER, ROWS)
"""The faster kernels, in the order in which they are asked."""


def make_codes(request: CodesRequest) -> list[Tensor]:
    """INT8 codes of the rows of ``request.x``.

    Returns:
        what :class:`.request.Codes` holds, as far as it was asked for; then, with a threshold, ``active [1 + K]`` int32: how
        many columns reached it anywhere, and which, ascending (see :mod:`quantkit.ops.gpu.product.columns`).

    Raises:
        ValueError: a source that is none, or lacks what it needs, or would have to come before columns that are taken aside.
        BackendError: no kernel handles what is asked for.
    """
    if request.source or request.x2 is not None:
        check_source(request)
    if request.x.device.type == "cuda":
        for kernel in IN_GLUON:
            if service.runs(kernel.name) and kernel.why_not(request) is None:
                try:
                    return kernel.launch(request)
                except CompilationError as error:
                    service.take_gluon_out(str(error).strip().splitlines()[-1])
    if reason := PORTABLE.why_not(request):
        raise BackendError(f"no kernel makes these codes: {reason}")
    return PORTABLE.launch(request)


def check_source(request: CodesRequest) -> None:
    """Raises ValueError where ``source`` and ``x2`` of a request do not belong together."""
    source, alone = request.source, request.x2 is None
    if source not in NORMS + GATES:
        raise ValueError(f"source={source!r} is not known: there are {', '.join(NORMS + GATES)}, and none without x2")
    if alone and source in GATES:
        raise ValueError(f"source={source!r} is a gate, and needs the other factor as x2")
    if request.side_index is not None:
        raise ValueError(f"source={source!r} cannot be fused where side columns are taken: apply it before quantize")
