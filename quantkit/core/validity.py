"""Whether the values in an operand can be what a quantizer wrote. Shapes and types are the operand's own affair.

An operand may come from anywhere: a file with a flipped bit, a state that somebody edited. An index that points outside of its
row would have a kernel read what belongs to another request, and a scale that is not finite makes nonsense of a whole layer.
Everything is looked at once, when values come in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.core.errors import MethodError, ModelError
from quantkit.core.formats import Quantized
from quantkit.core.operand import Operand
from quantkit.core.tracing import constant_while_tracing, in_memory

LONGEST_WITH_ALL_CODES = (2**31 - 1) // (128 * 255)
"""Sums of so many products of any two INT8 codes, less a zero point, fit into int32."""


def value_fault(operand: Operand) -> str | None:
    """What of the values of ``operand`` makes no sense, as a part of a sentence; None if all of it does.

    Codes are read where not every number that fits into their storage is one, so not those of 8 bits but in the longest rows,
    and where groups have multipliers. Tensors without memory, such as those on the meta device, have no values to look at.
    """
    if operand.stored.is_meta or not in_memory(operand.stored):
        return None
    rewrite, weight, input_ = operand.rewrite, operand.weight, operand.input
    wrong: list[tuple[Tensor, str]] = []

    def refuse(flags: Tensor, sentence: str) -> None:
        if flags.numel():
            wrong.append((flags.any(), sentence))

    def demand_positive(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            refuse(~(tensor.isfinite() & (tensor > 0)), f"{name} is not finite and above zero everywhere")

    def demand_finite(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            refuse(~tensor.isfinite(), f"{name} is not finite everywhere")

    # Other libraries write one code more at the lower end, which sums have room for but in the longest rows.
    number = weight.number
    lowest = -number.qmax - (operand.in_features <= LONGEST_WITH_ALL_CODES)
    if operand.stored.numel() and lowest > -128:
        least, most = operand.codes.aminmax()
        wrong.append(((least < lowest) | (most > number.qmax), f"weight holds codes beyond {lowest} to {number.qmax}"))
    demand_positive("weight_scale", operand.scale)
    if operand.multipliers is not None:
        multipliers = operand.multipliers.float()
        kind = "odd whole numbers" if operand.input_groups else "whole numbers"
        off = ~((multipliers >= 1) & (multipliers < 2**15)) | (multipliers != multipliers.round())  # no sum has room for more
        off = off | (multipliers % 2 != 1) if operand.input_groups else off
        refuse(off, f"its multipliers are not {kind} from 1 on")
    demand_positive("input_scale", operand.input_scale)
    zero = operand.input_zero_point
    if zero is not None and isinstance(input_, Quantized):
        low, high = input_.number.lowest, input_.number.qmax
        refuse((zero < low) | (zero > high), f"input_zero_point is beyond {low} to {high}")
    demand_finite("shift", rewrite.shift)
    demand_positive("pre_scale", rewrite.pre_scale)
    if rewrite.rotation is not None and rewrite.rotation.signs is not None:
        refuse(rewrite.rotation.signs.abs() != 1, "rotation_signs holds something else than 1 and -1")
    demand_finite("bias", operand.bias)
    demand_finite("outlier_weight", operand.outlier_weight)
    indices = _index_faults(operand.in_features, rewrite.permutation, rewrite.outliers)
    flags = torch.stack([flag for flag, _ in wrong]).tolist() if wrong else []
    fault = indices or next((sentence for flag, (_, sentence) in zip(flags, wrong, strict=True) if flag), None)
    if fault is None:
        try:
            operand.check_sums()
        except MethodError as error:
            fault = str(error)
    return fault


def check_indices(operand: Operand) -> None:
    """Raise a ModelError where an operand's indices of channels point outside of it: kernels read where they point."""
    rewrite = operand.rewrite
    if rewrite.permutation is None and rewrite.outliers is None:
        return
    fault = _index_faults(operand.in_features, rewrite.permutation, rewrite.outliers)
    if fault is not None:
        raise ModelError(
            f"an INT8 layer of {operand.in_features} to {operand.out_features} features cannot run: {fault}. Its state is "
            "damaged, or was changed; load it again"
        )


@constant_while_tracing
def _index_faults(channels: int, permutation: Tensor | None, outliers: Tensor | None) -> str | None:
    for name, index in (("permutation", permutation), ("outlier_index", outliers)):
        if index is None or index.is_meta or not in_memory(index):
            continue
        ordered = index.sort().values
        whole = torch.arange(channels, dtype=torch.int64, device=index.device)
        if name == "permutation" and not torch.equal(ordered, whole):
            return f"permutation is no order of {channels} channels"
        if index.numel() and (ordered[0] < 0 or ordered[-1] >= channels or bool((ordered[1:] == ordered[:-1]).any())):
            return f"outlier_index does not name different ones of {channels} channels"
    return None
