"""Accounting for every weight matrix of a model in its report: how many weights each linear has, and what else stays in
floating point."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from quantkit.core.report import LayerRecord, Report, percent
from quantkit.core.sites import Kept
from quantkit.layers.linear import W8A8Linear
from quantkit.model.experts import is_fused
from quantkit.model.targets import IGNORED, NOT_TARGETED, matches

log = logging.getLogger("quantkit")
EMBEDDING, HEAD_OR_TIED = "embedding", "output head or tied"
EXPECTED = {EMBEDDING, HEAD_OR_TIED, Kept.HEAD, Kept.TIED, IGNORED, NOT_TARGETED}
"""Reasons that surprise nobody: users chose them, or every quantized language model has them."""
MUCH, LITTLE = 0.1, 0.01
"""If more than the first part of the weights stays in floating point for other reasons, the log warns of it, and names each
reason that has at least the second part of them."""
STACKED = "in one parameter of a form that is not known"
WAYS_OUT = {
    Kept.NEVER_RAN: "pass calibration data that reaches them",
    "no calibration token reached it": "pass more calibration data",
    Kept.ROUTER: "name them in targets= to have them in INT8",
    f"experts fused {STACKED}": "docs/extending.md says how quantkit learns it",
}


def account(model: nn.Module, report: Report, ignore: Sequence[Any] = (), targets: Sequence[Any] | None = None) -> None:
    """Give each linear of ``report`` its number of weights, and list in ``others`` the matrices that none of them holds.

    Args:
        model: after its linears have become INT8, with experts apart that were taken apart.
        report: with a record for every linear; changed in place.
        ignore, targets: as in :func:`quantkit.quantize`.
    """
    seen: set[int] = set()
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        if isinstance(module, W8A8Linear):
            layer.weights = module.in_features * module.out_features
        else:
            layer.weights = sum(_count(p, seen) for p in module.parameters() if p.dim() > 1)
    report.others = []
    held, modules = {layer.name for layer in report.layers}, dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owners = name.split(".")[:-1]
        if parameter.dim() < 2 or any(".".join(owners[:end]) in held for end in range(1, len(owners) + 1)):
            continue
        owner = modules[".".join(owners)]
        if any(matches(name, owner, pattern) for pattern in ignore):
            reason = IGNORED
        elif targets is not None and not any(matches(name, owner, pattern) for pattern in targets):
            reason = NOT_TARGETED
        else:
            reason = _reason(owner, modules[".".join(owners[:-1])], name, parameter)
        if weights := _count(parameter, seen):
            report.others.append(LayerRecord(name.removesuffix(".weight"), "float", reason=reason, weights=weights))


def say(report: Report) -> None:
    """Log what was done, and warn if much of the model stays in floating point although nobody asked for that."""
    log.info(report.summary)
    unexpected = {why: records for why, records in report.floats().items() if records[0].reason not in EXPECTED}
    share = report.share(record for records in unexpected.values() for record in records)
    if report.scheme is not None and share > MUCH:
        said = [
            f"{_names(records)} ({percent(part)}: {_why(records[0])})"
            for records in unexpected.values()
            if (part := report.share(records)) >= LITTLE
        ]
        log.warning("%s of the weights stay in floating point: %s", percent(share), "; ".join(said))


def _count(parameter: Tensor, seen: set[int]) -> int:
    """How many weights a parameter has; 0 if its memory was counted before, as that of tied weights is."""
    place = (parameter.data_ptr() if parameter.layout is torch.strided else 0) or id(parameter)
    if place in seen:
        return 0
    seen.add(place)
    return parameter.numel()


def _reason(owner: nn.Module, parent: nn.Module, name: str, parameter: Tensor) -> str:
    """Why a matrix that no linear holds stays in floating point."""
    kind = type(owner).__name__
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return EMBEDDING
    if isinstance(owner, _ConvNd):
        return "convolution: quantkit has no INT8 product for it"
    if any(isinstance(module, nn.MultiheadAttention) for module in (owner, parent)):
        return "a weight of nn.MultiheadAttention, which reads it without calling a linear"
    if isinstance(owner, ParametrizationList):
        return "a parameter of a parametrization, which computes the weight anew: take parametrizations away first"
    if is_fused(owner):
        return (
            f"experts fused in one parameter of {kind}, which only quantkit.quantize() takes apart, if that computes the same"
        )
    if parameter.dim() == 3 and min(parameter.shape) > 1:
        what = "experts fused" if "expert" in f"{name} {kind}".lower() else "matrices stacked"
        return f"{what} {STACKED}: {kind}"
    if isinstance(owner, nn.Linear):
        return f"a weight of {kind}, which does not compute what nn.Linear computes"
    return f"a weight of {kind}, which is no linear of PyTorch's"


def _names(records: Sequence[LayerRecord]) -> str:
    """The names of records in short: numbers become ``*``, and at most three are told."""
    names = list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", record.name) for record in records))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _why(record: LayerRecord) -> str:
    way_out = WAYS_OUT.get(record.reason_in_short)
    return f"{record.reason}; {way_out}" if way_out else record.reason
