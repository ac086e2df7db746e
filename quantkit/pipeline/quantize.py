"""quantize(): the straight line. Everything up to ``_convert`` only looks; ``_convert`` changes the model."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quantkit.calibration.data import calibration_batches, peek, probe_batch
from quantkit.calibration.observe import SiteStatistics, observe
from quantkit.calibration.statistics import Range, TokenSample
from quantkit.calibrators import Calibrator, Codes, Plan, SiteView, Stage, View, resolve
from quantkit.calibrators.base import HeadClusters, rotation_ahead
from quantkit.core.errors import CalibrationError, EquivalenceError, MethodError, ModelError
from quantkit.core.numerics import qmax, quantize_weight, sqnr_db
from quantkit.core.progress import Progress, tracked
from quantkit.core.report import LayerRecord, Report, attach
from quantkit.core.scheme import Scheme
from quantkit.core.sites import Site
from quantkit.core.transform import Rotation, Transform, groups_fault
from quantkit.discovery import discover
from quantkit.discovery.discover import NEVER_RAN
from quantkit.discovery.equivalence import folded_by_hooks, outputs_of, relative_error, reordered_by_hooks, tolerance_for
from quantkit.layers.attention import AttentionQuantizer, attach_attention, calibrated, explained, find_attention
from quantkit.layers.linear import W8A8Linear, check_exact
from quantkit.model.experts import put_back, unfuse
from quantkit.model.modules import linears_of, replace_module, weight_of
from quantkit.model.targets import check_patterns, chosen
from quantkit.pipeline.fold import (
    Fold,
    Reorder,
    Rows,
    changed_rows,
    restore_norms,
    row_sources,
    snap,
    split,
    split_order,
    store_norms,
)
from quantkit.pipeline.recipe import Recipe
from quantkit.pipeline.rotate import Turn, turn

log = logging.getLogger("quantkit")
M = TypeVar("M", bound=nn.Module)
BROKEN = "_quantkit_interrupted"


@torch.inference_mode(False)  # what is created here must live outside of it
def quantize(
    model: M,
    method: str | Calibrator | Sequence[str | Calibrator] = "smoothquant",
    *,
    calibration: Iterable[Any] | None = None,
    tokenizer: Any = None,
    scheme: str | Scheme | None = "w8a8",
    ignore: Sequence[str | type] = (),
    targets: Sequence[str | type] | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> M:
    """Quantize the linears of ``model`` to INT8 weights and INT8 activations, in place.

    Args:
        model: any module with its weights in memory; ``nn.Linear`` and transformers' ``Conv1D`` are replaced by
            :class:`quantkit.W8A8Linear`. Output heads, routers and tied weights stay in floating point.
        method: a name (``"smoothquant"``, ``"rtn"``), a calibrator, or a list of them, applied in order.
        calibration: an iterable of batches (tensors, dicts of keyword arguments, tuples of arguments), or strings with
            ``tokenizer``. Left out, a causal LM of transformers samples its own tokens.
        tokenizer: turns strings into tokens.
        scheme: a name or a :class:`quantkit.Scheme`; None applies only what preserves the function and leaves the
            model in floating point.
        ignore: layer names, globs or classes that stay in floating point.
        targets: if given, only these are quantized; they may include output heads and routers.
        seed: for sampled calibration data and for calibrators.
        progress: show progress bars; None decides by the terminal. A function is called with what is done, the items so far
            and the items in all, see :mod:`quantkit.core.progress`.

    Returns:
        The same object. :func:`quantkit.report` tells what happened to every layer.

    Raises:
        QuantkitError: a subclass that says what is wrong, before the model is changed.
    """
    calibrators, number_format = resolve(method), None if scheme is None else Scheme.parse(scheme)
    _check(model, calibrators, number_format)
    rewrites = any(c.stage == Stage.MODEL for c in calibrators)
    taken_apart = unfuse(model) if rewrites or number_format is not None else []
    undo = ExitStack()
    try:
        return _quantize(model, calibrators, calibration, tokenizer, number_format, ignore, targets, seed, progress, undo)
    except BaseException:
        _take_back(model, undo)
        raise
    finally:
        put_back(model, taken_apart)


def _quantize(
    model: M,
    calibrators: Sequence[Calibrator],
    calibration: Iterable[Any] | None,
    tokenizer: Any,
    number_format: Scheme | None,
    ignore: Sequence[str | type],
    targets: Sequence[str | type] | None,
    seed: int,
    progress: Progress,
    undo: ExitStack,
) -> M:
    linears = _linears(model, ignore, targets)
    static = number_format is not None and number_format.is_static
    kinds = dict.fromkeys([kind for c in calibrators for kind in c.statistics] + ([Range] if static else []))
    data = calibration_batches(model, calibration, tokenizer=tokenizer, needed=bool(kinds), seed=seed, progress=progress)
    first, data = peek(data)
    if static and any(c.stage == Stage.ROTATE for c in calibrators):
        _check_walks_again(data, "a static scale behind a rotation")
    piece = probe_batch(model, first)
    attend = None
    if number_format is not None and number_format.quantizes_attention:
        label = next((c.label_head for c in calibrators if isinstance(c, HeadClusters) and c.head_clusters > 1), None)
        if static or label is not None:
            _check_walks_again(data, "calibrating attention, once linears are quantized,")
        attend = functools.partial(
            calibrated, model, find_attention(model, first), number_format, data, label, progress=progress
        )
    turned, rewrites = _rewrite(model, calibrators, (piece, first), seed, progress, undo)

    orders = number_format is not None and any(c.stage == Stage.PARTITION for c in calibrators)
    discovery = discover(model, piece, carriers=orders)
    if any(reason == NEVER_RAN for reason in discovery.kept.values()):
        discovery = discover(model, first, carriers=orders)  # more tokens reach more experts
    kept = chosen(linears, discovery.kept, ignore, targets)
    placed = {name for site in discovery.sites for name in site.linears}
    # Heads and routers have no site unless something else reads their input; targets= may still ask for them.
    alone = [Site(n, (n,), (n,), weight_of(linears[n]).shape[1]) for n in linears if n not in placed and n not in kept]
    sites = [site for site in (*discovery.sites, *alone) if not all(name in kept for name in site.linears)]
    _check_chosen(linears, kept, sites, number_format)

    if number_format is not None and (kinds or calibration is not None):
        kinds[TokenSample] = None  # for the report
    digest = hashlib.sha256()
    statistics = observe(model, data, sites, list(kinds), seed=seed, progress=progress, digest=digest) if kinds else {}
    if kinds:
        unreached = {name: "no calibration token reached it" for s in sites if s.name not in statistics for name in s.linears}
        kept |= unreached
        sites = [site for site in sites if site.name in statistics]
        if not sites:
            raise CalibrationError(
                f"no calibration token reached a layer to quantize ({', '.join(unreached)}): pass more data, or other targets="
            )
    views = _views(sites, linears, kept, statistics, number_format)
    for view in views:
        view.turned = next((space for what in turned if (space := what.space_of(view.site.linears))), "")
    later = [c for c in calibrators if c.stage != Stage.MODEL]
    codes, notes = _plan(model, later, views, data, calibration is not None, seed, progress)
    record = Report(
        [c.name for c in calibrators],
        number_format.name if number_format else None,
        seed,
        "given" if calibration is not None else "sampled from the model" if kinds else "not needed",
        rewrites=rewrites,
        calibration_sha256=digest.hexdigest() if kinds else None,
    )
    if all(isinstance(pattern, str) for pattern in (*ignore, *(targets or ()))):
        chosen_by = None if targets is None else tuple(map(str, targets))
        record.recipe = Recipe(tuple(calibrators), number_format, seed, tuple(map(str, ignore)), chosen_by).to_dict()
    fixed = [view for view in views if view.scheme.is_static]
    ranges = _static_ranges(model, fixed, data, seed, progress) if static else {}
    _convert(model, views, codes, notes, kept, number_format, ranges, attend, piece, record, progress)
    attach(model, record)
    log.info(record.summary)
    return model


def _check(model: nn.Module, calibrators: Sequence[Calibrator], scheme: Scheme | None) -> None:
    """Everything that can be refused without running the model."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model is a {type(model).__name__}: pass a torch.nn.Module, or use quantkit.load(path) for a checkpoint"
        )
    if getattr(model, BROKEN, False):
        raise ModelError("an earlier conversion of this model was interrupted half way: load the model again")
    if any(isinstance(module, W8A8Linear) for module in model.modules()):
        raise ModelError("the model is quantized already: load the floating-point model again to quantize it in another way")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"parameter {name!r} is on the meta device (offloaded, or never loaded): load the whole model into memory first"
            )
    rounder = next((c.name for c in calibrators if c.stage == Stage.ROUND), None)
    if scheme is None and rounder:
        raise MethodError(
            f"scheme=None leaves the model in floating point, so there is nothing to round: drop {rounder}, or pass a scheme"
        )
    if scheme is not None and scheme.is_simulation:
        log.warning(
            "scheme %s is a simulation: rounded as it says, but stored and computed with more bits, no smaller or faster",
            scheme.name,
        )


def _linears(model: nn.Module, ignore: Sequence[Any], targets: Sequence[Any] | None) -> dict[str, nn.Module]:
    linears = linears_of(model)
    if not linears:
        raise ModelError(
            f"{type(model).__name__} has no linear to quantize: quantkit replaces nn.Linear and transformers' Conv1D"
        )
    check_patterns(ignore, linears, "ignore")
    if targets is not None:
        check_patterns(targets, linears, "targets")
    return linears


def _check_chosen(linears: dict[str, nn.Module], kept: dict[str, str], sites: Sequence[Site], scheme: Scheme | None) -> None:
    names = [name for site in sites for name in site.linears if name not in kept]
    if not names:
        raise ModelError(
            f"no linear is left to quantize: all {len(linears)} stay in floating point "
            f"({'; '.join(sorted(set(kept.values())))}); targets= takes heads and routers all the same"
        )
    for name in names if scheme else ():
        assert scheme is not None
        check_exact(weight_of(linears[name]).shape[1], scheme, name)
    if scheme is not None and scheme.norm_bits is not None and not any(_behind_norm(site) for site in sites):
        raise ModelError(
            f"scheme {scheme.name} gives bits to what norms write, and no linear alone reads the output of a norm: leave out "
            "norm_bits"
        )


def _behind_norm(site: Site) -> bool:
    return site.producer is not None and site.producer.kind == "norm"


def _views(
    sites: Sequence[Site],
    linears: dict[str, nn.Module],
    kept: dict[str, str],
    statistics: dict[str, SiteStatistics],
    scheme: Scheme | None,
) -> list[SiteView]:
    views = []
    for site in sites:
        targets = {name: linears[name] for name in site.linears if name not in kept}
        own = (scheme or Scheme()).of_linear(behind_norm=_behind_norm(site))
        views.append(SiteView(site, own, scheme is None, Transform(), targets, statistics.get(site.name, {})))
    return views


def _rewrite(
    model: nn.Module,
    calibrators: Sequence[Calibrator],
    batches: tuple[Any, Any],
    seed: int,
    progress: Progress,
    undo: ExitStack,
) -> tuple[list[Turn], list[str]]:
    """Rewrite the float model as calibrators in ``Stage.MODEL`` say, and prove that it is still the same."""
    piece, turned = batches[0], list[Turn]()
    said: list[str] = []
    for calibrator in (c for c in calibrators if c.stage == Stage.MODEL):
        plan = _decide(calibrator, View(model, [], lambda: batches, seed, functools.partial(tracked, progress=progress)), [])
        if plan.turn is None:
            continue
        wanted = outputs_of(model, piece)
        noise = relative_error(wanted, outputs_of(model, piece))
        try:
            said += turn(model, plan.turn, undo)
        except MethodError as error:
            raise MethodError(f"{calibrator.name}: {error}") from error
        change, tolerance = relative_error(wanted, outputs_of(model, piece)), tolerance_for(wanted, noise, model)
        if change > tolerance:
            raise EquivalenceError(
                f"{calibrator.name} changed the model by {change:.1e} (allowed {tolerance:.1e}); it was undone. In a short "
                "format, rounding the rotated weights may be the cause: rotate in float32, and cast afterwards"
            )
        turned.append(plan.turn)
        said.append(f"this changed the float model by {change:.1e} (relative)")
    return turned, said


def _take_back(model: nn.Module, undo: ExitStack) -> None:
    """Undo rewrites of the float model, unless its linears are on their way to INT8 already."""
    if not getattr(model, BROKEN, False):
        setattr(model, BROKEN, True)  # an interruption from here on would leave it half way
        undo.close()
        delattr(model, BROKEN)


def _decide(calibrator: Calibrator, view: View, views: Sequence[SiteView]) -> Plan:
    try:
        plan = calibrator.plan(view)
    except MethodError as error:
        raise MethodError(f"{calibrator.name}: {error}") from error
    _check_plan(calibrator, plan, views)
    return plan


def _plan(
    model: nn.Module,
    calibrators: Sequence[Calibrator],
    views: list[SiteView],
    data: Iterable[Any],
    given: bool,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Codes], dict[str, dict[str, Any]]]:
    """Let each calibrator decide on top of the ones before it; nothing changes but the views."""

    def again(calibrator: Calibrator) -> Iterable[Any]:
        if not calibrator.statistics and not given:
            raise CalibrationError(
                f"{calibrator.name} reads calibration data but asks for no statistics, so none was sampled for it: pass "
                "calibration=, or name a statistic in its `statistics`"
            )
        _check_walks_again(data, calibrator.name)
        return data

    codes: dict[str, Codes] = {}
    notes: dict[str, dict[str, Any]] = {view.name: {"turned": view.turned} if view.turned else {} for view in views}
    for index, calibrator in enumerate(calibrators):
        for view in views:
            view.rotation_ahead = rotation_ahead(view, calibrators[index + 1 :])
        track = functools.partial(tracked, progress=progress)
        view_of_model = View(model, views, functools.partial(again, calibrator), seed, track)
        plan = _decide(calibrator, view_of_model, views)
        for view in views:
            if view.name in plan.transforms:
                if view.clips and not plan.transforms[view.name].is_identity:
                    raise MethodError(
                        f"{calibrator.name} changes the weights of {view.name!r}, whose clipping was learned before: put "
                        f"{calibrator.name} first"
                    )
                later = copy.deepcopy(plan.transforms[view.name])  # it may hold a parameter, which a fold would change
                view.transform = snap(model, view.site, view.transform.then(later))
            view.clips |= {linear: plan.clips[linear].clone() for linear in view.linears if linear in plan.clips}
            notes[view.name].update(plan.notes.get(view.name, {}))
        codes |= plan.codes
    return codes, notes


def _check_plan(calibrator: Calibrator, plan: Plan, views: Sequence[SiteView]) -> None:
    """Raises MethodError for an answer that cannot be carried out, while nothing has changed."""
    name, sites = calibrator.name, {view.name: view for view in views}
    if not isinstance(plan, Plan) or not all(isinstance(part, dict) for key, part in vars(plan).items() if key != "turn"):
        raise MethodError(f"{name}.plan() returned {_kind(plan)}: return a quantkit.Plan, which holds dicts")
    if plan.turn is not None and calibrator.stage != Stage.MODEL:
        raise MethodError(f"{name} rotated the model in stage {calibrator.stage.name}: that is for Stage.MODEL")
    unknown = [str(site) for site in (*plan.transforms, *plan.notes) if site not in sites]
    if unknown:
        raise MethodError(f"{name} planned for sites that do not exist: {', '.join(unknown)}; use the `name` of a site")
    for site, transform in plan.transforms.items():
        fault = _transform_fault(transform, sites[site], calibrator.stage)
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
    owners = {linear: view for view in views for linear in view.linears}
    for linear, codes in plan.codes.items():
        if linear not in owners:
            raise MethodError(f"{name} rounded {linear!r}, which is not among the layers to quantize")
        fault = _codes_fault(codes, owners[linear], linear)
        if fault:
            raise MethodError(f"{name} rounded {linear!r} to what cannot be: {fault}")
    for linear, clip in plan.clips.items():
        if linear not in owners:
            raise MethodError(f"{name} clipped {linear!r}, which is not among the layers to quantize")
        rows = len(weight_of(owners[linear].linears[linear]))
        wanted = f"[{rows}, 1] torch.float32 on {owners[linear].device}"
        fault = _tensor_fault("clip", clip, wanted, lambda c: (c > 0) & (c <= 1), "above 0 and up to 1")
        if fault:
            raise MethodError(f"{name} clipped {linear!r} to what cannot be: {fault}")


def _transform_fault(transform: Transform, view: SiteView, stage: Stage) -> str | None:
    if not isinstance(transform, Transform):
        return f"{_kind(transform)} is no quantkit.Transform"
    if transform.is_identity:
        return None
    if stage == Stage.ROUND:
        return "Stage.ROUND only chooses integers, for weights that change no more; transform in a calibrator before it"
    if view.transform.rotation is not None:
        return "an earlier rotation has mixed them; put the rotation last"
    k, device, rotation = view.site.channels, view.device, transform.rotation
    if not isinstance(rotation, Rotation | None):
        return f"rotation is {_kind(rotation)}, not a quantkit.Rotation"
    if rotation is not None and k % rotation.block:
        return f"a rotation of {rotation.block} does not divide them; take a smaller power of two"
    threshold = transform.threshold
    if threshold is not None and (not isinstance(threshold, float) or not 0 < threshold < float("inf")):
        return f"threshold is {threshold!r}, not a positive, finite float"
    both = (transform, view.transform)
    if any(t.threshold for t in both):
        if any(t.steps not in ([], ["threshold"]) for t in both):
            return (
                "a threshold is in the units of the model's own activation: nothing may scale or mix it; take columns instead"
            )
        if not view.scheme.takes_threshold:
            return "a threshold goes with activations that have symmetric scales per token, such as scheme='w8a8'"
    groups = transform.groups or view.transform.groups
    if transform.groups is not None and (wrong := groups_fault(transform.groups, k)):
        return wrong
    if view.transform.groups is not None and transform.permutation is not None:
        return "an earlier calibrator has put them in clusters, which another permutation would break up"
    if rotation is not None and groups is not None and any(size % rotation.block for size in groups):
        return (
            f"a rotation of {rotation.block} would mix clusters of {', '.join(map(str, groups))}; take borders at its multiples"
        )

    def exists(index: Tensor) -> Tensor:
        return (index >= 0) & (index < k)

    signs, outliers = None if rotation is None else rotation.signs, transform.outliers
    count = outliers.numel() if isinstance(outliers, Tensor) else "n"
    vector, index = f"[{k}] torch.float32 on {device}", f"torch.int64 on {device}"
    for what, value, wanted, holds, rule in (
        ("shift", transform.shift, vector, torch.isfinite, "finite"),
        ("scale", transform.scale, vector, _invertible, "positive and finite, like 1 / scale"),
        ("signs", signs, vector, lambda v: v.abs() == 1, "1 or -1"),
        ("permutation", transform.permutation, f"[{k}] {index}", exists, f"0 to {k - 1}"),
        ("outliers", outliers, f"[{count}] {index}", exists, f"0 to {k - 1}"),
    ):
        fault = None if value is None else _tensor_fault(what, value, wanted, holds, rule)
        if fault:
            return fault
        if value is not None and what in ("permutation", "outliers") and len(value.unique()) < len(value):
            return f"{what} names a channel twice"
    return None


def _codes_fault(codes: Codes, view: SiteView, linear: str) -> str | None:
    if not isinstance(codes, Codes):
        return f"{_kind(codes)} is no quantkit.Codes"
    (rows, channels), top, device = weight_of(view.linears[linear]).shape, qmax(view.scheme.weight_bits), view.device
    count = len(view.transform.groups or ())
    fault = _tensor_fault(
        "codes",
        codes.codes,
        f"[{rows}, {channels}] torch.int8 on {device}",
        lambda q: (q >= -top) & (q <= top),
        f"-{top} to {top}",
    ) or _tensor_fault(
        "scale", codes.scale, f"[{rows}, {1 + count}] torch.float32 on {device}", _invertible, "positive and finite"
    )
    if fault is None and bool((codes.scale[:, 1:] % 2 != 1).any()):
        return "scale holds multiples of its first column that are no odd numbers: quantize_weight(groups=) makes them"
    return fault


def _tensor_fault(what: str, value: Any, wanted: str, holds: Callable[[Tensor], Tensor], rule: str) -> str | None:
    """Unless ``value`` reads as ``wanted`` and all its elements hold to the rule, what is wrong with it."""
    if _kind(value) != wanted:
        return f"{what} is {_kind(value)}, not {wanted}"
    bad = value[~holds(value)]
    return f"{what} holds {bad[0].item()}, not {rule}" if len(bad) else None


def _invertible(scale: Tensor) -> Tensor:
    return (scale > 0) & scale.isfinite() & (1 / scale).isfinite()


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    gradient = " with a gradient (detach it)" if value.requires_grad else ""
    return f"{list(value.shape)} {value.dtype} on {value.device}{gradient}"


def _check_walks_again(data: Iterable[Any], what: str) -> None:
    if iter(data) is data:
        raise CalibrationError(
            f"{what} reads the calibration data more than once: pass a list or a DataLoader, not a generator"
        )


def _static_ranges(
    model: nn.Module, views: Sequence[SiteView], data: Iterable[Any], seed: int, progress: Progress
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and largest value of every transformed site; behind a rotation, from a second pass over the data."""
    seen: dict[str, Any] = {view.name: view.statistic(Range) for view in views if view.transform.rotation is None}
    rotated = [view for view in views if view.transform.rotation is not None]
    if rotated:
        _check_walks_again(data, "a static scale behind a rotation")
        transforms = {view.name: view.transform for view in rotated}
        again = observe(model, data, [v.site for v in rotated], [Range], transforms=transforms, seed=seed, progress=progress)
        for view in rotated:
            if view.name not in again:
                raise CalibrationError(
                    f"no token of the second pass over the data reached {view.name!r}: pass the same batches"
                )
            seen[view.name] = again[view.name][Range]
    return {view.name: _static_range(view, seen[view.name]) for view in views}


def _static_range(view: SiteView, seen: Range) -> tuple[Tensor, Tensor]:
    """Least and largest value of a site, or of each of its clusters ``[G]``. Raises CalibrationError where float32 holds no
    scale for them."""
    groups = view.transform.groups or (view.site.channels,)
    low = torch.stack([part.min() for part in seen.low.split(groups)])
    high = torch.stack([part.max() for part in seen.high.split(groups)])
    reach = torch.maximum(-low, high) if view.scheme.symmetric else high.clamp_min(0) - low.clamp_max(0)
    if not bool(reach.isfinite().all()):
        raise CalibrationError(
            f"the input of {view.name!r} goes from {low.min():.1e} to {high.max():.1e} in calibration, too far apart for one "
            "scale in float32: look at the data, or take a symmetric scheme"
        )
    return low, high


def _convert(
    model: nn.Module,
    views: Sequence[SiteView],
    codes: dict[str, Codes],
    notes: dict[str, dict[str, Any]],
    kept: dict[str, str],
    scheme: Scheme | None,
    ranges: dict[str, tuple[Tensor, Tensor]],
    attend: Callable[[], dict[str, AttentionQuantizer]] | None,
    piece: Any,
    record: Report,
    progress: Progress,
) -> None:
    folds: list[Fold] = []
    reorders: list[Reorder] = []
    in_order, leftovers = {}, {}
    for view in views:
        fold, in_order[view.name] = split(model, view.site, view.transform)
        folds += [fold] if fold else []
        reorder, leftovers[view.name] = split_order(view.site, in_order[view.name])
        reorders += [reorder] if reorder else []
    if not _store_and_prove(model, folds, reorders, piece, record):
        reorders, leftovers = [], in_order
    setattr(model, BROKEN, True)
    try:
        changes, sources = changed_rows(folds), row_sources(reorders)
        orders = {reorder.site.name: reorder for reorder in reorders}
        folded = {fold.site.name: fold for fold in folds}
        for view in tracked(views, "converting", progress, "site"):
            for name in view.site.linears:
                linear = model.get_submodule(name)
                order = orders.get(view.name)
                said = {"order": f"of the rows of {' and '.join(order.sources)}"} if order else {}
                into = view.site.producer.module if view.site.producer and view.name in folded else None
                layer = LayerRecord(
                    name, "float", view.name, into, reason=kept.get(name) or view.site.reason, notes=notes[view.name] | said
                )
                if scheme is None or name in kept:
                    _change_float(linear, folded.get(view.name), changes.pop(name, None), order, sources.pop(name, None))
                else:
                    rows = changes.pop(name, None)
                    new = _to_int8(
                        linear, view, leftovers[view.name], rows, codes.get(name), view.clips.get(name),
                        ranges.get(view.name),
                    )  # fmt: skip
                    layer.sqnr_db = _output_sqnr(view, linear, new, folded.get(view.name), rows, order)
                    if name in sources:
                        new.reorder_rows(sources.pop(name))
                    layer.kind = "int8"
                    layer.at_run_time = leftovers[view.name].without("groups").steps
                    if view.scheme != scheme.of_linear():
                        layer.notes["scheme"] = view.scheme.name
                    replace_module(model, name, new)
                record.layers.append(layer)
        for name in changes | sources:
            _change_float(model.get_submodule(name), None, changes.get(name), None, sources.get(name))
        if attend is not None:
            quantizers = attend()  # of the model that will run: folds have changed its values, and rounding all the rest
            attach_attention(model, quantizers)
            record.rewrites += explained(quantizers)
    except BaseException:
        log.error("the conversion stopped half way: this model object is unusable, load it again")
        raise
    delattr(model, BROKEN)
    done = {layer.name for layer in record.layers}
    record.layers += [LayerRecord(name, "float", reason=reason) for name, reason in kept.items() if name not in done]


def _store_and_prove(model: nn.Module, folds: Sequence[Fold], reorders: Sequence[Reorder], piece: Any, record: Report) -> bool:
    """Write the norms, and prove with the real values that the float model is still the same; otherwise put them back.

    Returns:
        Whether the orders hold. The model is as it was but for them, where they do not.
    """
    if not folds and not reorders:
        return True
    wanted = outputs_of(model, piece)
    noise = relative_error(wanted, outputs_of(model, piece))
    old = store_norms(model, folds)
    try:
        tolerance = tolerance_for(wanted, noise, model)
        with folded_by_hooks(model, [(f.site, f.rows, f.scale, f.shift) for f in folds]):
            with reordered_by_hooks(model, [(r.site.linears, r.inverse, r.sources) for r in reorders]):
                record.equivalence = relative_error(wanted, outputs_of(model, piece))
            ordered = record.equivalence <= tolerance
            if not ordered and reorders:
                log.warning("the orders of %d sites cannot be folded, and are brought about at run time", len(reorders))
                record.equivalence = relative_error(wanted, outputs_of(model, piece))
        if record.equivalence > tolerance:
            raise EquivalenceError(
                f"folding changed the model by {record.equivalence:.1e} (allowed {tolerance:.1e}); it was undone. "
                "Please report the architecture; quantkit.quantize(model, method='rtn') needs no folding"
            )
        if folds and not any(bool((fold.scale != 1).any()) or bool(fold.shift.any()) for fold in folds):
            log.warning("every smoothing scale is 1: the transformation did nothing")
    except BaseException:
        restore_norms(model, old)
        raise
    return ordered


def _change_float(linear: Any, fold: Fold | None, rows: Rows | None, order: Reorder | None, source: Tensor | None) -> None:
    """Undo ``fold`` in the columns (and bias) of a float linear and change its first rows (and bias), in float32; then put the
    columns in their new order, and in the place of its first rows those in ``source``."""
    if fold is None and rows is None and order is None and source is None:
        return
    weight = weight_of(linear)
    new, bias = weight.float(), None if linear.bias is None else linear.bias.data.float()
    if fold is not None:
        bias = None if bias is None else bias + new @ fold.shift
        new = new * fold.scale
    if order is not None:
        new = new[:, order.permutation]
    if rows is not None:
        n = len(rows.factor)
        new = torch.cat([new[:n] * rows.factor[:, None], new[n:]])
        bias = None if bias is None else torch.cat([(bias[:n] - rows.shift) * rows.factor, bias[n:]])
    if bias is not None:
        linear.bias.data.copy_(bias)
    if source is not None:
        source = source.to(new.device)
        new[: len(source)] = new[source]
        if linear.bias is not None:
            linear.bias.data[: len(source)] = linear.bias.data[source]
    weight.copy_(new)


def _to_int8(
    linear: Any,
    view: SiteView,
    leftover: Transform,
    rows: Rows | None,
    codes: Codes | None,
    clip: Tensor | None,
    input_range: tuple[Tensor, Tensor] | None,
) -> W8A8Linear:
    weight = weight_of(linear).float()
    bias = None if linear.bias is None else linear.bias.detach().float()
    extra = view.transform.bias(weight)
    bias = extra if bias is None else bias if extra is None else bias + extra
    inner, side = view.transform.weight(weight)
    groups = view.transform.groups or ()
    if side is not None and leftover.scale is not None:
        assert leftover.outliers is not None
        side = side / leftover.scale[leftover.outliers]
    if codes is None:
        per_tensor, bits = view.scheme.weights == "tensor", view.scheme.weight_bits
        codes = Codes(*quantize_weight(inner, bits, per_tensor=per_tensor, groups=groups, clip=clip))
    scale = codes.scale
    if rows is not None:  # a row factor only moves the scale of the row: the codes stay
        n = len(weight) - len(rows.factor)
        factor = torch.cat([rows.factor, rows.factor.new_ones(n)])
        scale = torch.cat([scale[:, :1] * factor[:, None], scale[:, 1:]], 1)
        bias = None if bias is None else (bias - torch.cat([rows.shift, rows.shift.new_zeros(n)])) * factor
        side = None if side is None else side * factor[:, None]
    return W8A8Linear.from_float(
        linear, scheme=view.scheme, codes=codes.codes, weight_scale=scale, bias=bias, leftover=leftover,
        outlier_weight=side, input_range=input_range,
    )  # fmt: skip


def _output_sqnr(
    view: SiteView,
    linear: nn.Module,
    new: W8A8Linear,
    fold: Fold | None,
    rows: Rows | None,
    order: Reorder | None,
) -> float | None:
    """Of the layer's output on the sampled tokens, in the model's dtype: the float layer against the INT8 one."""
    if not view.has(TokenSample):
        return None
    tokens, _ = view.sampled()
    weight = weight_of(linear).float()
    wanted = tokens @ weight.t()
    given = tokens if fold is None else (tokens - fold.shift) / fold.scale
    got = new(given if order is None else given[:, order.permutation])
    if new.bias is not None:
        got = got - new.bias.float()
    if view.transform.shift is not None:
        wanted = wanted - weight @ view.transform.shift
    if rows is not None:
        wanted[:, : len(rows.factor)] *= rows.factor
    return sqnr_db(wanted, got)
