"""Which linears are quantized: names, globs or classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from quantkit.core.errors import TargetError


def matches(name: str, module: nn.Module, pattern: Any) -> bool:
    """Whether a class, a glob over the full name, the full name, or a whole part of the name matches."""
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    return fnmatchcase(name, pattern) or pattern in name.split(".") or name.startswith(f"{pattern}.")


def check_patterns(patterns: Sequence[Any], linears: dict[str, nn.Module], what: str) -> None:
    """Raises TargetError for a pattern of the wrong type, or one that matches no linear."""
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
            raise TargetError(f"{what}=[{pattern!r}] matches none of the {len(linears)} linear layers of the model{near}")


def chosen(
    linears: dict[str, nn.Module], kept: dict[str, str], ignore: Sequence[Any], targets: Sequence[Any] | None
) -> dict[str, str]:
    """Linears that stay in floating point, with the reason.

    ``targets`` overrules the defaults in ``kept``, and ``ignore`` everything. A tied weight or a layer that
    never ran stays in floating point whatever is asked.
    """
    float_ = dict(kept)
    for name, module in linears.items():
        forced = kept.get(name, "").startswith(("its weight is tied", "it never ran"))
        if targets is not None and not forced:
            if any(matches(name, module, pattern) for pattern in targets):
                float_.pop(name, None)
            else:
                float_[name] = "not among targets"
        if any(matches(name, module, pattern) for pattern in ignore):
            float_[name] = "ignored"
    return float_
