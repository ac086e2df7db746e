"""Every decision about a model, as data: what deciding writes and converting reads.

A :class:`ModelPlan` names the sites of a model and says, for each of them, which transform its channels get, which integers
its weights become or how these are found, and why. It holds tensors and plain values only, no module and no function. So it can
be looked at, saved and read back (:func:`quantkit.save_plan`, :func:`quantkit.load_plan`), sent to another process, and carried
out on another copy of the same model: :func:`quantkit.convert` is a function of a model and a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quantkit.core.heads import HeadSizes
from quantkit.core.report import Report
from quantkit.core.scheme import Scheme
from quantkit.core.sites import Site
from quantkit.core.spaces import SpaceRotation
from quantkit.core.transform import Transform


@dataclass(frozen=True)
class Codes:
    """The integers of one linear: ``codes [N, K]`` int8 and ``scale [N, 1]`` float32, for the transformed weight.

    With groups of channels ``scale`` is ``[N, 1 + G]``: a base scale and odd multipliers, see
    :func:`quantkit.core.weights.weight_grid`.
    """

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class LinearPlan:
    """How the integers of one linear are found.

    Attributes:
        codes: the integers themselves; None to round to nearest.
        clip: ``[N, 1]`` float32 in (0, 1], the share of its largest value that each row's grid spans when it is rounded; None
            for all of it.
    """

    codes: Codes | None = None
    clip: Tensor | None = None


@dataclass(frozen=True)
class SitePlan:
    """What happens to one site.

    Attributes:
        site: its name, its linears, and who writes it.
        scheme: number formats of its linears.
        transform: what is done to its channels, as it is in effect once what folds is stored in the model's dtype.
        linears: those that are quantized, by name; the others of the site stay in floating point.
        input_range: least and largest value of the transformed activation, ``[1]`` or ``[G]`` each; static schemes only.
        reorders: whether the linears that carry its channels bring them in the order of the transform, at no cost.
        notes: what calibrators said, for the report.
    """

    site: Site
    scheme: Scheme
    transform: Transform
    linears: Mapping[str, LinearPlan]
    input_range: tuple[Tensor, Tensor] | None = None
    reorders: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionPlan:
    """How what one module's attention reads is rounded.

    Attributes:
        scheme: number formats.
        heads: sizes of its calls.
        clusters: at most so many of the channels of each head.
        tensors: labels of channels and ranges, by the names of the buffers of ``AttentionQuantizer``.
    """

    scheme: Scheme
    heads: HeadSizes
    clusters: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelPlan:
    """What happens to a model, in the order in which it happens.

    Attributes:
        scheme: number formats; None leaves the model in floating point.
        rotations: spaces that are rotated in the float weights first of all.
        sites: what happens to each site.
        kept: name of a linear -> why it stays in floating point.
        attention: name of a module -> how its attention is rounded, last of all.
        report: what is known already for the report: methods, data, seed, proofs. Its layers are written by converting.
    """

    scheme: Scheme | None
    rotations: tuple[SpaceRotation, ...]
    sites: tuple[SitePlan, ...]
    kept: Mapping[str, str]
    attention: Mapping[str, AttentionPlan]
    report: Report
