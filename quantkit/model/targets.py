"""Which linears are quantized: the defaults that discovery proposes, changed by what the user lists as targets or ignores.

A list holds names of layers, globs over names, parts of names, or classes of modules.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import nn

from quantkit.core.errors import TargetError
from quantkit.core.sites import Kept

IGNORED, NOT_TARGETED = "ignored", "not among targets"
"""Why a linear stays in floating point that the user left out."""


def matches(name: str, module: nn.Module, pattern: Any) -> bool:
    """Whether the linear ``module``, called ``name`` in its model, is meant by ``pattern``.

    A pattern is a class, or a string: the full name, a glob over the full name, one part of the name between two dots, or the
    first parts of it.
    """
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    return fnmatchcase(name, pattern) or pattern in name.split(".") or name.startswith(f"{pattern}.")


def check_patterns(
    patterns: Sequence[Any], linears: Mapping[str, nn.Module], what: str, reasons: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Look for mistakes in a list of patterns.

    Args:
        patterns: what the user passed.
        linears: name -> module, of all linears.
        what: the name of the argument, for messages.
        reasons: name of a module that is no linear -> why, for whoever names one.

    Raises:
        TargetError: ``patterns`` is no list, a pattern is of another type, or it matches no linear.
    """
    if isinstance(patterns, (str, type)):
        raise TargetError(f"{what}={patterns!r} is a single value: pass a list, {what}=[{patterns!r}]")
    for pattern in patterns:
        if not isinstance(pattern, (str, type)):
            raise TargetError(f"{what} holds {pattern!r}: pass layer names, globs such as '*.mlp.*', or module classes")
        if not any(matches(name, module, pattern) for name, module in linears.items()):
            close = difflib.get_close_matches(
                str(pattern), [*linears, *{n.rpartition(".")[2] for n in linears}], n=3, cutoff=0.3
            )
            near = f"; close to it: {', '.join(close)}" if close else ""
            near = f"; {pattern}: {reasons[pattern]}" if isinstance(pattern, str) and pattern in reasons else near
            raise TargetError(f"{what}=[{pattern!r}] matches none of the {len(linears)} linear layers of the model{near}")


def asked_in_float32(model: nn.Module, linears: Iterable[str]) -> set[str]:
    """Names of those linears that models of transformers list as more precise than the rest.

    The lists hold parts of names of parameters, such as ``wo`` or ``gate.weight``.
    """
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    parts = {part for module in model.modules() for name in lists for part in getattr(module, name, None) or ()}
    return {name for name in linears if any(fnmatchcase(f".{name}.weight.", f"*.{part}.*") for part in parts)}


NEVER = (Kept.ADAPTER, Kept.TIED, Kept.READ, Kept.WRITTEN, Kept.NEVER_RAN)
"""Reasons that targets= does not overrule."""


def chosen(
    linears: Mapping[str, nn.Module],
    kept: Mapping[str, Kept],
    ignore: Sequence[Any],
    targets: Sequence[Any] | None,
    heads: bool = False,
) -> dict[str, str]:
    """Name of each linear that stays in floating point -> the reason, as a text.

    Args:
        linears: name -> module, of all linears.
        kept: the defaults, from :func:`quantkit.discover`.
        ignore: what matches one of these patterns stays in floating point.
        targets: if given, what matches none of these patterns stays in floating point, and what matches one does not, even if
            it is in ``kept``; except for parts of adapters, which stay trainable, and for linears that share a weight with
            another module, whose weight is read or written by others, or that never ran, which cannot be quantized.
        heads: output heads do not stay in floating point for being such.
    """
    float_: dict[str, str] = dict(kept)
    for name, module in linears.items():
        if targets is not None and kept.get(name) not in NEVER:
            if any(matches(name, module, pattern) for pattern in targets):
                float_.pop(name, None)
            else:
                float_[name] = NOT_TARGETED
        if heads and kept.get(name) == Kept.HEAD:
            float_.pop(name, None)
        if any(matches(name, module, pattern) for pattern in ignore):
            float_[name] = IGNORED
    return float_
