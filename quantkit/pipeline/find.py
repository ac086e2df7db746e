"""Which sites a model has, and which of its linears stay in floating point."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantkit.calibration.observe import SiteStatistics, observe
from quantkit.calibration.statistics import TokenSample
from quantkit.calibrators import Stage
from quantkit.core.errors import CalibrationError, ModelError, QuantkitError
from quantkit.core.facts import check_exact
from quantkit.core.scheme import Scheme
from quantkit.core.sites import Discovery, Kept, Site
from quantkit.discovery.discover import cause_of_failure, discover, linears_alone
from quantkit.discovery.probe import EndlessError
from quantkit.model.modules import lookalikes_of, weight_of
from quantkit.model.targets import chosen, matches
from quantkit.pipeline.check import Request
from quantkit.pipeline.data import Data

log = logging.getLogger("quantkit")


@dataclass(frozen=True)
class Found:
    """What is known of a model before anything is decided.

    Attributes:
        linears: all of them, by name.
        sites: those of which at least one linear is quantized.
        kept: name of a linear, or of what looks like one -> why it stays in floating point.
        statistics: of each site, if any were asked for.
        few: a few tokens of each site, if none were.
    """

    linears: Mapping[str, nn.Module]
    sites: Sequence[Site]
    kept: Mapping[str, str]
    statistics: Mapping[str, SiteStatistics]
    few: Mapping[str, SiteStatistics] = field(default_factory=dict)


def find_sites(model: nn.Module, request: Request, data: Data, linears: dict[str, nn.Module]) -> Found:
    """Probe the model, choose what is quantized, and collect statistics in one pass over the data.

    Raises:
        ModelError: nothing is left to quantize, or a layer is too long for exact sums.
        CalibrationError: no token reached a layer, or one was not finite.
    """
    orders = request.scheme is not None and any(c.stage == Stage.PARTITION for c in request.calibrators)
    ignored = [n for n, module in linears.items() if any(matches(n, module, pattern) for pattern in request.ignore)]
    discovery = discovered(model, data.piece, ignored, carriers=orders, heads=request.heads)
    if Kept.NEVER_RAN in discovery.kept.values():
        discovery = discovered(
            model, data.first, ignored, carriers=orders, heads=request.heads
        )  # more tokens reach more experts
    fixed = discovery.kept | dict.fromkeys(data.written, Kept.WRITTEN)
    kept = lookalikes_of(model) | chosen(linears, fixed, request.ignore, request.targets, request.heads)
    placed = {name for site in discovery.sites for name in site.linears}
    # Heads and routers have no site unless something else reads their input; targets= may still ask for them.
    alone = [Site(n, (n,), (n,), weight_of(linears[n]).shape[1]) for n in linears if n not in placed and n not in kept]
    sites = [site for site in (*discovery.sites, *alone) if not all(name in kept for name in site.linears)]
    check_found(linears, kept, sites, request.scheme)
    if not data.kinds:  # a few tokens for the report, which no calibrator has asked for
        few = {} if request.scheme is None else observe(model, [data.piece], sites, [TokenSample], progress=False)
        return Found(linears, sites, kept, {}, few)
    statistics = observe(
        model, data.batches, sites, list(data.kinds), seed=request.seed, progress=request.progress, digest=data.digest
    )
    unreached = {name: "no calibration token reached it" for s in sites if s.name not in statistics for name in s.linears}
    sites = [site for site in sites if site.name in statistics]
    if not sites:
        raise CalibrationError(
            f"no calibration token reached a layer to quantize ({', '.join(unreached)}): pass more data, or other targets="
        )
    return Found(linears, sites, {**kept, **unreached}, statistics)


def discovered(model: nn.Module, batch: Any, ignored: Sequence[str], *, carriers: bool, heads: bool) -> Discovery:
    """What :func:`discover` finds.

    If the model does not run with made-up outputs of all linears, ``ignored`` ones keep theirs. Where no other linear would
    help, little is found, and the log says so.

    Raises:
        ModelError: it does not run with that either, and would if a linear, which is named, were ignored too.
    """
    for real in dict.fromkeys(((), tuple(ignored))):
        try:
            return discover(model, batch, carriers=carriers, heads=heads, real=real)
        except (QuantkitError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001  the model may raise anything
            failed = error
    # With EndlessError each try would take long.
    cause = None if isinstance(failed, EndlessError) else cause_of_failure(model, batch, ignored)
    what = (
        f"{type(model).__name__} does not run while its linears put out made-up values, by which quantkit finds out how it is "
        f"connected ({type(failed).__name__}: {failed})"
    )
    if cause is not None:
        raise ModelError(f"{what}; it runs if {cause!r} computes what it does: pass ignore={[*ignored, cause]}") from failed
    log.warning("%s: nothing is folded, and what methods ask for is done at run time", what)
    return linears_alone(model, batch)


def check_found(
    linears: Mapping[str, nn.Module], kept: Mapping[str, str], sites: Sequence[Site], scheme: Scheme | None
) -> None:
    """Raises ModelError where nothing is left to quantize, or the scheme cannot be had."""
    names = [name for site in sites for name in site.linears if name not in kept]
    if not names:
        raise ModelError(
            f"no linear is left to quantize: all {len(linears)} stay in floating point "
            f"({'; '.join(sorted(set(kept.values())))}); targets= takes heads and routers all the same"
        )
    if scheme is None:
        return
    for name in names:
        check_exact(weight_of(linears[name]).shape[1], scheme.input, name)
    if scheme.norm_input is not None and not any(behind_norm(site) for site in sites):
        raise ModelError(
            f"scheme {scheme.name} gives bits to what norms write, and no linear alone reads the output of a norm: leave out "
            "-norm in its name"
        )


def behind_norm(site: Site) -> bool:
    """Whether the site is the output of a norm that nothing else reads."""
    return site.producer is not None and site.producer.kind == "norm"
