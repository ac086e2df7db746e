"""All folds rehearsed together, on the real model and the real batch: the last word on what the probe has found.

The probe replaces linears, so it might have been misled by what depends on real values. Here every linear computes, and folds
are played through hooks (:mod:`.hooks`). Scales are rehearsed first, and then shifts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.sites import Site
from quantkit.discovery.equivalence import outputs_of, relative_error, tolerance_for
from quantkit.discovery.hooks import PlayedFold, folded_by_hooks
from quantkit.model.modules import first_input

EXACT = 1e-7
"""The relative error of outputs that agree, but for a sum that was added up in another order."""


def rehearse(model: nn.Module, batch: Any, sites: Sequence[Site], shifts: Mapping[str, Tensor] | None = None) -> set[str]:
    """Names of those sites whose fold would change the model. All ``sites`` have a producer.

    By default scales are folded that are random powers of two. These commute with every rounding, except of the smallest
    numbers in float16, so the outputs of the model have to agree to the noise: a fold that is wrong may change little, where
    experts hardly count. If they do not agree, the sites are halved until those that are wrong stand alone.

    Args:
        shifts: name of a site -> ``[n]``, the shifts of its producer's first rows, to be folded instead of scales. The outputs
            then have to agree to the rounding of the model's dtype.
    """
    if not sites:
        return set()
    wanted = outputs_of(model, batch)
    noise = relative_error(wanted, outputs_of(model, batch))
    if not math.isfinite(noise):
        return {site.name for site in sites}  # two runs have nothing in common, so nothing can be shown
    narrow = any(t.dtype == torch.float16 for t in (*wanted, *model.parameters()))
    if shifts is None and not narrow:
        tolerance = max(EXACT, 10 * noise)
    else:
        tolerance = tolerance_for(wanted, noise, None if shifts is None else model)
    random = torch.Generator().manual_seed(2)

    def wrong(some: Sequence[Site]) -> set[str]:
        if not some:
            return set()
        folds = [_random_scale(site, random) if shifts is None else _shift(site, shifts[site.name]) for site in some]
        with folded_by_hooks(model, folds):
            if relative_error(wanted, outputs_of(model, batch)) <= tolerance:
                return set()
        if len(some) == 1:
            return {some[0].name}
        middle = len(some) // 2
        found = wrong(some[:middle]) | wrong(some[middle:])
        return found or {site.name for site in some}  # they only fail together: none is safe

    return wrong(sites)


def _random_scale(site: Site, random: torch.Generator) -> PlayedFold:
    """Scales of 1/4, 1/2, 1, 2 or 4, drawn anew for every row of the producer."""
    assert site.producer is not None
    rows = site.producer.rows
    c = torch.ones(int(rows.max()) + 1, dtype=torch.float32, device="cpu")
    c[rows] = torch.exp2(torch.randint(-2, 3, (len(c),), generator=random, dtype=torch.int64, device="cpu").float())[rows]
    return PlayedFold(
        site,
        (c, torch.zeros_like(c)),
        c[rows] ** -site.producer.power,
        torch.zeros(len(rows), dtype=torch.float32, device="cpu"),
    )


def _shift(site: Site, d: Tensor) -> PlayedFold:
    """``d`` is taken from the producer's rows, and added to the channels that they feed."""
    assert site.producer is not None
    rows = site.producer.rows
    return PlayedFold(site, (torch.ones_like(d), d), torch.ones(len(rows), dtype=torch.float32, device="cpu"), d[rows])


def arriving_shifts(model: nn.Module, batch: Any, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Those sites where a shift of the producer's rows arrives unchanged at all linears, with the shift that was tried.

    The model's outputs might not show a shift that is bent on its way, so the inputs of the linears are compared. A shift is
    one to two times as large as its channel and of random sign, so that a curve or a product in between shows at once.

    Args:
        sites: with a producer each, and none of them behind another.

    Returns:
        Name of a site -> ``[n]`` float32, what was taken from the first rows of its producer.
    """
    if not sites:
        return {}
    random, plain = torch.Generator().manual_seed(4), _inputs(model, batch, sites, [])
    shifts = {}
    for site in sites:
        assert site.producer is not None
        rows = site.producer.rows
        size = torch.zeros(int(rows.max()) + 1, dtype=torch.float32, device="cpu")
        for x in plain[site.name]:
            size.scatter_reduce_(0, rows, _largest(x).cpu(), "amax")
        sign = 2.0 * torch.randint(0, 2, (len(size),), generator=random, dtype=torch.int64, device="cpu") - 1
        shifts[site.name] = (1 + torch.rand(len(size), generator=random, dtype=torch.float32, device="cpu")) * sign * size
    shifted = _inputs(model, batch, sites, [_shift(site, shifts[site.name]) for site in sites])

    def arrives(site: Site) -> bool:
        assert site.producer is not None
        d, before, after = shifts[site.name][site.producer.rows], plain[site.name], shifted[site.name]
        return bool(before) and len(before) == len(after) and all(map(_is_less_by, after, before, itertools.repeat(d)))

    return {site.name: shifts[site.name] for site in sites if arrives(site)}


def _is_less_by(after: Tensor, before: Tensor, d: Tensor) -> bool:
    """Whether ``after`` is ``before - d`` in every channel, to a few roundings of the largest value there."""
    if before.shape != after.shape:
        return False
    d, slack = d.to(before.device), 16 * max(torch.finfo(before.dtype).eps, 1e-6)
    return bool((_largest(after.double() - (before.double() - d)) <= slack * (_largest(before) + d.abs())).all())


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value in each channel of ``x [..., K]``, as ``[K]`` float32; 0 without tokens."""
    rows = x.reshape(-1, x.shape[-1]).abs().float()
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).amax(0)


def _inputs(model: nn.Module, batch: Any, sites: Sequence[Site], folds: Sequence[PlayedFold]) -> dict[str, list[Tensor]]:
    """Name of a site -> what all of its linears are called on with ``folds`` in play, before the hooks there undo them."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    with ExitStack() as stack:
        for site in sites:
            for name in site.linears:

                def note(_: nn.Module, args: Any, kwargs: Any, seen: list[Tensor] = seen[site.name]) -> None:
                    seen.append(first_input(args, kwargs).detach().clone())

                hook = model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
        stack.enter_context(folded_by_hooks(model, folds))
        outputs_of(model, batch)
    return seen
