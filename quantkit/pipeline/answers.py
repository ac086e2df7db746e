"""What calibrators answer, checked while nothing has changed: each answer is asked for here, and refused here."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.calibrators import Calibrator, Plan, SiteView, Stage, View
from quantkit.core.errors import MethodError
from quantkit.core.formats import Quantized, groups_fault
from quantkit.core.groups import shares
from quantkit.core.plan import Codes
from quantkit.core.progress import Progress, tracked
from quantkit.core.rotation import Rotation
from quantkit.core.transform import Transform
from quantkit.model.modules import weight_of


def progress_of(progress: Progress) -> Any:
    """What :class:`quantkit.View` offers as ``progress``."""
    return functools.partial(tracked, progress=progress)


def answer_of(calibrator: Calibrator, view: View, views: Sequence[SiteView]) -> Plan:
    """The plan of ``calibrator`` for the sites in ``views``.

    Raises:
        MethodError: it has none, or one that cannot be carried out; says which calibrator.
    """
    try:
        plan = calibrator.plan(view)
    except MethodError as error:
        raise MethodError(f"{calibrator.name}: {error}") from error
    check_answer(calibrator, plan, views)
    return plan


def check_answer(calibrator: Calibrator, plan: Plan, views: Sequence[SiteView]) -> None:
    """Raises MethodError for an answer that cannot be carried out."""
    name, sites = calibrator.name, {view.name: view for view in views}
    if not isinstance(plan, Plan) or not all(isinstance(part, dict) for key, part in vars(plan).items() if key != "rotate"):
        raise MethodError(f"{name}.plan() returned {kind_of(plan)}: return a quantkit.Plan, which holds dicts")
    if plan.rotate is not None and calibrator.stage != Stage.MODEL:
        raise MethodError(f"{name} rotated the model in stage {calibrator.stage.name}: that is for Stage.MODEL")
    unknown = [str(site) for site in (*plan.transforms, *plan.notes) if site not in sites]
    if unknown:
        raise MethodError(f"{name} planned for sites that do not exist: {', '.join(unknown)}; use the `name` of a site")
    for site, transform in plan.transforms.items():
        fault = transform_fault(transform, sites[site], calibrator.stage)
        if fault:
            raise MethodError(
                f"{name} planned what cannot be done to the {sites[site].site.channels} channels of {site!r}: {fault}"
            )
    for site, notes in plan.notes.items():
        try:
            json.dumps({**notes})
        except (TypeError, ValueError) as error:
            raise MethodError(
                f"{name} noted {notes!r} for {site!r}: notes are a dict of plain numbers and strings ({error})"
            ) from None
    if plan.codes and calibrator.stage != Stage.ROUND:
        raise MethodError(
            f"{name} chose integers in stage {calibrator.stage.name}: scales may still change until Stage.ROUND; "
            "split it into a calibrator that scales and one that rounds"
        )
    _check_linears(name, plan, {linear: view for view in views for linear in view.linears})


def _check_linears(name: str, plan: Plan, owners: Mapping[str, SiteView]) -> None:
    for linear, codes in plan.codes.items():
        if linear not in owners:
            raise MethodError(f"{name} rounded {linear!r}, which is not among the layers to quantize")
        fault = codes_fault(codes, owners[linear], linear)
        if fault:
            raise MethodError(f"{name} rounded {linear!r} to what cannot be: {fault}")
    for linear, clip in plan.clips.items():
        if linear not in owners:
            raise MethodError(f"{name} clipped {linear!r}, which is not among the layers to quantize")
        rows = len(weight_of(owners[linear].linears[linear]))
        wanted = f"[{rows}, 1] torch.float32 on {owners[linear].device}"
        fault = tensor_fault("clip", clip, wanted, lambda c: (c > 0) & (c <= 1), "above 0 and up to 1")
        if fault:
            raise MethodError(f"{name} clipped {linear!r} to what cannot be: {fault}")


def transform_fault(transform: Transform, view: SiteView, stage: Stage) -> str | None:
    """Why ``transform`` cannot be done to the site after what was decided before; None if it can."""
    if not isinstance(transform, Transform):
        return f"{kind_of(transform)} is no quantkit.Transform"
    if transform.is_identity:
        return None
    if stage == Stage.ROUND:
        return "Stage.ROUND only chooses integers, for weights that change no more; transform in a calibrator before it"
    if view.transform.rotation is not None:
        return "an earlier rotation has mixed them; put the rotation last"
    k, rotation = view.site.channels, transform.rotation
    if not isinstance(rotation, Rotation | None):
        return f"rotation is {kind_of(rotation)}, not a quantkit.Rotation"
    if rotation is not None and k % rotation.block:
        return f"a rotation of {rotation.block} does not divide them; take a smaller power of two"
    return _threshold_fault(transform, view) or _groups_fault(transform, view) or _vectors_fault(transform, view)


def _threshold_fault(transform: Transform, view: SiteView) -> str | None:
    threshold = transform.threshold
    if threshold is not None and (not isinstance(threshold, float) or not 0 < threshold < float("inf")):
        return f"threshold is {threshold!r}, not a positive, finite float"
    both = (transform, view.transform)
    if all(t.threshold is None for t in both):
        return None
    if any(t.steps not in ([], ["threshold"]) for t in both):
        return "a threshold is in the units of the model's own activation: nothing may scale or mix it; take columns instead"
    if not view.scheme.takes_threshold:
        return "a threshold goes with activations that have symmetric scales per token, such as scheme='w8a8'"
    return None


def _groups_fault(transform: Transform, view: SiteView) -> str | None:
    groups, rotation = transform.groups or view.transform.groups, transform.rotation
    if transform.groups is not None and (wrong := groups_fault(transform.groups, view.site.channels)):
        return wrong
    if groups and view.scheme.weight.groups(view.site.channels):
        return f"the weights of {view.scheme.name} have groups of their own; take a scheme without, such as 'w8a8'"
    if view.transform.groups is not None and transform.permutation is not None:
        return "an earlier calibrator has put them in groups, which another permutation would break up"
    if rotation is not None and groups is not None and any(size % rotation.block for size in groups):
        return (
            f"a rotation of {rotation.block} would mix groups of {', '.join(map(str, groups))}; take borders at its multiples"
        )
    return None


def _vectors_fault(transform: Transform, view: SiteView) -> str | None:
    k, device = view.site.channels, view.device

    def exists(index: Tensor) -> Tensor:
        return (index >= 0) & (index < k)

    signs, outliers = None if transform.rotation is None else transform.rotation.signs, transform.outliers
    count = outliers.numel() if isinstance(outliers, Tensor) else "n"
    vector, index = f"[{k}] torch.float32 on {device}", f"torch.int64 on {device}"
    for what, value, wanted, holds, rule in (
        ("shift", transform.shift, vector, torch.isfinite, "finite"),
        ("scale", transform.scale, vector, _invertible, "positive and finite, like 1 / scale"),
        ("signs", signs, vector, lambda v: v.abs() == 1, "1 or -1"),
        ("permutation", transform.permutation, f"[{k}] {index}", exists, f"0 to {k - 1}"),
        ("outliers", outliers, f"[{count}] {index}", exists, f"0 to {k - 1}"),
    ):
        fault = None if value is None else tensor_fault(what, value, wanted, holds, rule)
        if fault:
            return fault
        if value is not None and what in ("permutation", "outliers") and len(value.unique()) < len(value):
            return f"{what} names a channel twice"
    return None


def codes_fault(codes: Codes, view: SiteView, linear: str) -> str | None:
    """Why ``codes`` cannot be the integers of a linear of the site; None if they can."""
    if not isinstance(codes, Codes):
        return f"{kind_of(codes)} is no quantkit.Codes"
    (rows, channels), top, device = weight_of(view.linears[linear]).shape, view.scheme.weight.number.qmax, view.device
    groups = view.weight_format.groups(channels)
    fault = tensor_fault(
        "codes",
        codes.codes,
        f"[{rows}, {channels}] torch.int8 on {device}",
        lambda q: (q >= -top) & (q <= top),
        f"-{top} to {top}",
    ) or tensor_fault(
        "scale", codes.scale, f"[{rows}, {1 + len(groups)}] torch.float32 on {device}", _invertible, "positive and finite"
    )
    if fault is not None or not view.transform.groups:
        return fault
    if bool((codes.scale[:, 1:] % 2 != 1).any()):
        return "scale holds multipliers of its first column that are no odd numbers: quantize_weight(groups=) makes them"
    input_ = view.scheme.input
    if isinstance(input_, Quantized) and shares(codes.codes, codes.scale, groups, input_.number.symmetric).isnan().any():
        return f"codes in groups of {groups} and their multipliers add up to more than int32 holds"
    return None


def tensor_fault(what: str, value: Any, wanted: str, holds: Callable[[Tensor], Tensor], rule: str) -> str | None:
    """Unless ``value`` reads as ``wanted`` and all its elements hold to the rule, what is wrong with it."""
    if kind_of(value) != wanted:
        return f"{what} is {kind_of(value)}, not {wanted}"
    bad = value[~holds(value)]
    return f"{what} holds {bad[0].item()}, not {rule}" if len(bad) else None


def kind_of(value: Any) -> str:
    """Shape, dtype and device of a tensor, or the type of anything else, in words."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    gradient = " with a gradient (detach it)" if value.requires_grad else ""
    return f"{list(value.shape)} {value.dtype} on {value.device}{gradient}"


def _invertible(scale: Tensor) -> Tensor:
    return (scale > 0) & scale.isfinite() & (1 / scale).isfinite()
