"""What a calibrator is: an object that looks at a model and its data, decides, and returns its decision as data.

A calibrator never changes the model. It is given a :class:`View` with one :class:`SiteView` for each site, that is for each
activation that some linears read, and it returns a :class:`Plan`: transforms of channels, integers, clips and notes. The
pipeline checks the plan, applies it and proves that the model still computes the same. So a calibrator can be tested without a
model, and calibrators can be combined: each one sees statistics and weights as the plans before it have left them.

:class:`Calibrator` is the protocol that the pipeline asks for. :class:`PerSite` is a base class for the usual case, a decision
for one site at a time. :class:`Foreseen` and :class:`HeadClusters` are what a calibrator may offer besides.
:func:`check_attributes` and :func:`check_order` refuse calibrators and compositions that make no sense, with the reason.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from quantkit.calibration.statistics import Statistic, TokenSample
from quantkit.core.deprecated import renamed
from quantkit.core.errors import MethodError
from quantkit.core.formats import Quantized
from quantkit.core.plan import Codes as Codes
from quantkit.core.rotation import Rotation
from quantkit.core.scheme import Scheme
from quantkit.core.sites import Site
from quantkit.core.spaces import SpaceRotation
from quantkit.core.transform import Transform
from quantkit.model.modules import weight_of

S = TypeVar("S", bound=Statistic)
T = TypeVar("T")


class Stage(IntEnum):
    """What a calibrator decides. A list of calibrators runs in this order, never backwards."""

    MODEL = 0  # a rewrite of the float model as a whole, which everything later sees
    SCALE = 1  # scales and shifts of channels
    OUTLIERS = 2  # which channels stay out of the INT8 product; may come before SCALE, which then sees the rest
    PARTITION = 3  # which channels go together
    ROTATE = 4  # orthogonal mixing of channels
    ROUND = 5  # the integers themselves


@dataclass(frozen=True)
class Plan:
    """A calibrator's whole answer, as data.

    Attributes:
        transforms: site name -> what to do to its channels, on top of earlier calibrators.
        codes: linear name -> its integers; linears without an entry are rounded to nearest.
        clips: linear name -> ``[N, 1]`` float32 in (0, 1], the share of each row's largest (transformed) weight that its grid
            spans; what is beyond saturates. Whoever chooses the integers later starts from it.
        notes: site name -> a few values for the report, such as ``{"alpha": 0.6}``.
        rotate: which spaces of the float model to rotate in its weights, before anything else. Only in ``Stage.MODEL``.
    """

    transforms: dict[str, Transform] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    rotate: SpaceRotation | None = None
    clips: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class SiteView:
    """What a calibrator sees of one site, as earlier calibrators left it.

    Attributes:
        site: names, channels, producer.
        scheme: the number format that is aimed at.
        transform: what earlier calibrators decided; statistics and weights below include it.
        fold_only: the model stays in floating point, so that only what folds into the producer can be applied.
        linears: those to be quantized, by name; read only.
        rotation_ahead: what a later calibrator is known to apply to the channels as they are numbered now: errors are to be
            judged behind it, see :class:`Foreseen`.
        rotated_space: the space that the site is part of, if it was rotated in the weights: ``"residual stream"`` or
            ``"heads of 64"``, say. Empty if it was not.
        clips: grids that earlier calibrators chose, by linear, see :class:`Plan`.
    """

    site: Site
    scheme: Scheme
    fold_only: bool
    transform: Transform
    linears: Mapping[str, nn.Module]
    _statistics: Mapping[type[Statistic], Statistic]
    rotation_ahead: Rotation | None = None
    rotated_space: str = ""
    clips: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.site.name

    turned = renamed("SiteView.turned", "rotated_space")

    @property
    def weight_format(self) -> Quantized:
        """The number format of its weights, with the groups that earlier calibrators put its channels in."""
        return self.scheme.weight.in_groups(self.transform.groups or ())

    @property
    def device(self) -> torch.device:
        """Of its weights; every tensor of a plan has to be there too."""
        return weight_of(next(iter(self.linears.values()))).device

    def has(self, kind: type[Statistic]) -> bool:
        """Whether this statistic was collected."""
        return kind in self._statistics

    def statistic(self, kind: type[S]) -> S:
        """The site's statistic of one ``kind`` that the calibrator asked for."""
        return self._collected(kind).after(self.transform)

    def sampled(self) -> tuple[Tensor, Tensor]:
        """Sampled tokens ``[n, K]`` float32 of the original activation and how many each stands for, ``[n]``."""
        return self._collected(TokenSample).weighted()

    def _collected(self, kind: type[S]) -> S:
        if kind not in self._statistics:
            what = getattr(kind, "__name__", kind)
            raise MethodError(f"{what} was not collected for {self.name!r}: list the class in `statistics`")
        return self._statistics[kind]  # type: ignore[return-value]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """``(name, W' [N, K] float32)`` of each linear to be quantized, one at a time, as copies."""
        for name, linear in self.linears.items():
            weight = weight_of(linear)
            changed = self.transform.weight(weight.float())[0]
            yield name, changed.clone() if changed.data_ptr() == weight.data_ptr() else changed


class Track(Protocol):
    """A function of some items and of a word for what is done with them, which returns the items."""

    def __call__(self, items: Iterable[T], what: str, /) -> Iterable[T]: ...


@dataclass
class View:
    """What a calibrator sees of the model. Nothing in it may be changed.

    In ``Stage.MODEL`` there are no sites yet, and ``batches()`` has two: a small one to probe with, and the first of the data.

    Attributes:
        model: for calibrators that learn block by block; read only.
        sites: one view per site.
        batches: starts another pass over the calibration data; raises CalibrationError where that is impossible.
        seed: for calibrators that draw random numbers.
        progress: ``progress(items, "what")`` gives the same items and tells the user how far it is.
    """

    model: nn.Module
    sites: Sequence[SiteView]
    batches: Callable[[], Iterable[Any]]
    seed: int
    progress: Track


@runtime_checkable
class Calibrator(Protocol):
    """The protocol. Any object with these four attributes can be passed as ``method=``.

    The first three are only read, so they may be attributes of the class, fields of a frozen dataclass or properties.
    """

    @property
    def name(self) -> str:
        """What the report calls it."""

    @property
    def stage(self) -> Stage:
        """What it decides. This fixes its place in a composition."""

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """The kinds of :class:`~quantkit.calibration.statistics.Statistic` to collect; none means that it needs no data."""

    def plan(self, view: View) -> Plan:
        """Decide. Called once, after the pass over the data, with what earlier calibrators decided applied."""


@runtime_checkable
class Foreseen(Protocol):
    """What a calibrator in Stage.ROTATE may offer besides, if neither data nor earlier calibrators decide its rotations."""

    def foresee(self, site: SiteView) -> Rotation | None:
        """The rotation that it will apply to this site, None for none. Calibrators before it see it as ``rotation_ahead``."""


@runtime_checkable
class HeadClusters(Protocol):
    """What a calibrator may offer besides, for schemes that quantize attention: clusters of the channels of each head."""

    @property
    def head_clusters(self) -> int:
        """How many clusters each head may have at most; 1 for none."""

    def label_head(self, low: Tensor, high: Tensor, symmetric: bool, name: str) -> Tensor:
        """Cluster ``[D]`` int64, from 0 up, of each channel of the head called ``name``.

        Args:
            low, high: ``[P, D]`` float32, what channels reached in calibration in each of P tensors that share the clusters.
            symmetric: whether codes are symmetric.
            name: of the module and the head.
        """


def rotation_ahead(site: SiteView, later: Sequence[Calibrator]) -> Rotation | None:
    """The rotation that ``later`` calibrators will apply to ``site``, where it can be told; orders in between move blocks."""
    for calibrator in later:
        if calibrator.stage == Stage.ROTATE:
            return calibrator.foresee(site) if isinstance(calibrator, Foreseen) else None
    return None


class PerSite:
    """Base class of calibrators that look at one site at a time: override :meth:`plan_site`, ``name`` and ``stage``.

    ``statistics`` are empty unless they are overridden too.
    """

    if TYPE_CHECKING:  # a real property would stand in the way of a subclass that assigns one of these in __init__

        @property
        def name(self) -> str: ...
        @property
        def stage(self) -> Stage: ...
        @property
        def statistics(self) -> tuple[type[Statistic], ...]: ...

    else:
        statistics = ()

    def plan_site(self, site: SiteView) -> tuple[Transform, dict[str, Any]]:
        """The transform of this site and notes for the report."""
        raise MethodError(f"{type(self).__name__} has to override plan_site(site)")

    def plan(self, view: View) -> Plan:
        plan = Plan()
        for site in view.progress(view.sites, self.name):
            with torch.no_grad():
                answer = self.plan_site(site)
                if not isinstance(answer, tuple) or len(answer) != 2:
                    raise MethodError(f"plan_site() returned a {type(answer).__name__}: return (Transform, notes)")
                plan.transforms[site.name], plan.notes[site.name] = answer
        return plan


def check_attributes(calibrator: Calibrator) -> None:
    """Raises MethodError for a name, stage or statistics of another type than :class:`Calibrator` says."""
    name, stage, kinds = calibrator.name, calibrator.stage, calibrator.statistics
    if not isinstance(name, str):
        raise MethodError(f"{type(calibrator).__name__}: name is {name!r}, not a string")
    if not isinstance(stage, Stage):
        raise MethodError(f"{name}: stage is {stage!r}, not one of {', '.join(f'Stage.{s.name}' for s in Stage)}")
    if not isinstance(kinds, (tuple, list)):
        raise MethodError(f"{name}: statistics is {kinds!r}, not a tuple of classes such as (quantkit.Range,)")
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, Statistic):
            raise MethodError(
                f"{name}: statistics holds {kind!r}, not a class with update, merge, after and tensors (quantkit.Statistic)"
            )
        try:
            inspect.signature(kind).bind(1, "cpu", 0)
        except TypeError as error:
            raise MethodError(f"{name}: {kind.__name__} is to be built from (channels, device, seed): {error}") from None


FIRST = "it rewrites the float model, which everything else looks at"

REASONS: dict[tuple[Stage, Stage], str] = {
    **{(stage, Stage.MODEL): FIRST for stage in Stage if stage != Stage.MODEL},
    (Stage.ROUND, Stage.SCALE): "rounding comes last: a scale after it would undo the integers",
    (Stage.ROUND, Stage.OUTLIERS): "rounding comes last: choosing outliers after it would undo the integers",
    (Stage.ROUND, Stage.PARTITION): "rounding comes last: choosing other channels after it would undo the integers",
    (Stage.ROUND, Stage.ROTATE): "rounding comes last: a rotation after it would undo the integers",
    (Stage.ROTATE, Stage.SCALE): "a rotation mixes channels, so a scale computed for channels means nothing after it",
    (Stage.ROTATE, Stage.OUTLIERS): "a rotation mixes channels, so there are no outlier channels left to choose",
    (Stage.ROTATE, Stage.PARTITION): "a rotation mixes channels, so there are no channels left to choose from",
    (Stage.PARTITION, Stage.SCALE): "a scale changes the ranges by which channels were chosen",
    (Stage.PARTITION, Stage.OUTLIERS): "without its outliers a group of channels has another range",
}


def check_order(calibrators: Sequence[Calibrator]) -> None:
    """Raises MethodError, with the reason, for an order that makes no sense."""
    for before, after in itertools.pairwise(calibrators):
        if before.stage > after.stage and (before.stage, after.stage) in REASONS:
            raise MethodError(
                f"method=[..., {before.name}, {after.name}, ...]: {REASONS[before.stage, after.stage]}; "
                f"put {after.name} before {before.name}"
            )
    names = [c.name for c in calibrators]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise MethodError(f"method holds {twice} twice: the second finds nothing left to do; pass it once")
    rounders = [c.name for c in calibrators if c.stage == Stage.ROUND]
    if len(rounders) > 1:
        raise MethodError(f"method holds {' and '.join(rounders)}: both choose the integers; keep one")
