"""Deciding: calibrators look at the sites one after the other, and their answers become a plan. No model is changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibration.observe import SiteStatistics, observe
from quantkit.calibration.statistics import Range, TokenSample
from quantkit.calibrators import Calibrator, SiteView, Stage, View
from quantkit.calibrators.base import rotation_ahead
from quantkit.core.errors import CalibrationError, MethodError
from quantkit.core.formats import Quantized
from quantkit.core.plan import Codes, LinearPlan, ModelPlan, SitePlan
from quantkit.core.report import Report
from quantkit.core.scheme import Scheme
from quantkit.core.spaces import SpaceRotation
from quantkit.core.transform import Transform
from quantkit.model.adapters import Adapters
from quantkit.pipeline.answers import answer_of, progress_of
from quantkit.pipeline.check import Request
from quantkit.pipeline.data import Data
from quantkit.pipeline.find import Found, behind_norm
from quantkit.pipeline.fold import snap
from quantkit.pipeline.recipe import Recipe
from quantkit.pipeline.verify import Heard


@dataclass(frozen=True)
class Decision:
    """A plan; what was seen of each site, by which the report will judge its layers; and what the model said, to judge it."""

    plan: ModelPlan
    views: Mapping[str, SiteView]
    few: Mapping[str, SiteStatistics]
    heard: Heard | None = None

    def tokens(self, site: str) -> Tensor | None:
        """Sampled tokens ``[n, K]`` float32 of a site; None if none were collected."""
        view, few = self.views[site], self.few.get(site, {}).get(TokenSample)
        if isinstance(few, TokenSample):
            return few.weighted()[0]
        return view.sampled()[0] if view.has(TokenSample) else None


def decide(
    model: nn.Module,
    request: Request,
    data: Data,
    found: Found,
    rotations: tuple[SpaceRotation, ...],
    said: Sequence[str],
) -> Decision:
    """Let each calibrator decide on top of the ones before it.

    Args:
        model: rotated already.
        request, data, found: what is asked for, the calibration data, and what is known of the model.
        rotations: of the model.
        said: about them, for the report.

    Raises:
        MethodError: a calibrator fails, or answers what cannot be carried out.
        CalibrationError: it needs data that is not there.
    """
    views = [_view(site, found, request.scheme, rotations) for site in found.sites]
    codes, notes = _ask(model, request, data, views)
    ranges = _static_ranges(model, request, data, [view for view in views if view.scheme.is_static])
    sites = []
    for view in views:
        linears = {name: LinearPlan(codes.get(name), view.clips.get(name)) for name in view.linears}
        sites.append(SitePlan(view.site, view.scheme, view.transform, linears, ranges.get(view.name), False, notes[view.name]))
    report = Report(
        [c.name for c in request.calibrators],
        request.scheme.name if request.scheme else None,
        request.seed,
        data.source,
        rewrites=[*said, *Adapters.of(model).said],
        calibration_sha256=data.digest.hexdigest() if data.kinds else None,
        recipe=_recipe(request),
    )
    plan = ModelPlan(request.scheme, rotations, tuple(sites), found.kept, {}, report)
    return Decision(plan, {view.name: view for view in views}, found.few)


def _view(site: Any, found: Found, scheme: Scheme | None, rotations: Sequence[SpaceRotation]) -> SiteView:
    targets = {name: found.linears[name] for name in site.linears if name not in found.kept}
    own = (scheme or Scheme()).of_linear(behind_norm=behind_norm(site))
    view = SiteView(site, own, scheme is None, Transform(), targets, found.statistics.get(site.name, {}))
    view.rotated_space = next((space for what in rotations if (space := what.space_of(site.linears))), "")
    return view


def _recipe(request: Request) -> dict[str, Any] | None:
    """What repeats this run; None where a layer was chosen by its class, which plain data cannot say."""
    if not all(isinstance(pattern, str) for pattern in (*request.ignore, *(request.targets or ()))):
        return None
    targets = None if request.targets is None else tuple(request.targets)
    return Recipe(request.calibrators, request.scheme, request.seed, tuple(request.ignore), targets, request.heads).to_dict()


def _ask(
    model: nn.Module, request: Request, data: Data, views: list[SiteView]
) -> tuple[dict[str, Codes], dict[str, dict[str, Any]]]:
    """The integers that were chosen, by linear, and the notes for each site. What else was decided is in the views then."""
    calibrators = [c for c in request.calibrators if c.stage != Stage.MODEL]
    codes: dict[str, Codes] = {}
    notes: dict[str, dict[str, Any]] = {
        view.name: {"rotated space": view.rotated_space} if view.rotated_space else {} for view in views
    }
    for index, calibrator in enumerate(calibrators):
        for view in views:
            view.rotation_ahead = rotation_ahead(view, calibrators[index + 1 :])
        batches = functools.partial(_again, calibrator, data)
        answer = answer_of(calibrator, View(model, views, batches, request.seed, progress_of(request.progress)), views)
        for view in views:
            if view.name in answer.transforms:
                if view.clips and not answer.transforms[view.name].is_identity:
                    raise MethodError(
                        f"{calibrator.name} changes the weights of {view.name!r}, whose clipping was learned before: put "
                        f"{calibrator.name} first"
                    )
                later = copy.deepcopy(answer.transforms[view.name])  # it may hold a parameter, which a fold would change
                view.transform = snap(model, view.site, view.transform.then(later))
            view.clips |= {linear: answer.clips[linear].clone() for linear in view.linears if linear in answer.clips}
            notes[view.name].update(answer.notes.get(view.name, {}))
        codes |= answer.codes
    return codes, notes


def _again(calibrator: Calibrator, data: Data) -> Iterable[Any]:
    """Another pass over the data, for a calibrator that asks for one."""
    if not calibrator.statistics and not data.given:
        raise CalibrationError(
            f"{calibrator.name} reads calibration data but asks for no statistics, so none was sampled for it: pass "
            "calibration=, or name a statistic in its `statistics`"
        )
    data.check_walks_again(calibrator.name)
    return data.batches


def _static_ranges(
    model: nn.Module, request: Request, data: Data, views: Sequence[SiteView]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Least and largest value of every transformed site; behind a rotation, from a second pass over the data."""
    seen: dict[str, Any] = {view.name: view.statistic(Range) for view in views if view.transform.rotation is None}
    rotated = [view for view in views if view.transform.rotation is not None]
    if rotated:
        data.check_walks_again("a static scale behind a rotation")
        transforms = {view.name: view.transform for view in rotated}
        sites = [view.site for view in rotated]
        again = observe(
            model, data.batches, sites, [Range], transforms=transforms, seed=request.seed, progress=request.progress
        )
        for view in rotated:
            if view.name not in again:
                raise CalibrationError(
                    f"no token of the second pass over the data reached {view.name!r}: pass the same batches"
                )
            seen[view.name] = again[view.name][Range]
    return {view.name: _static_range(view, seen[view.name]) for view in views}


def _static_range(view: SiteView, seen: Range) -> tuple[Tensor, Tensor]:
    """Least and largest value of a site, or of each of its groups ``[G]``.

    Raises:
        CalibrationError: float32 holds no scale for them.
    """
    groups = view.transform.groups or (view.site.channels,)
    low = torch.stack([part.min() for part in seen.low.split(groups)])
    high = torch.stack([part.max() for part in seen.high.split(groups)])
    assert isinstance(view.scheme.input, Quantized)
    symmetric = view.scheme.input.number.symmetric
    reach = torch.maximum(-low, high) if symmetric else high.clamp_min(0) - low.clamp_max(0)
    if not bool(reach.isfinite().all()):
        raise CalibrationError(
            f"the input of {view.name!r} goes from {low.min():.1e} to {high.max():.1e} in calibration, too far apart for one "
            "scale in float32: look at the data, or take a symmetric scheme"
        )
    return low, high
