"""Modules of earlier versions, which can be imported from their old places for one more version.

The folder ``quantkit/_old`` holds a file for each of them, and the package looks there as well. Such a file has no names of
its own: it looks for whatever is asked of it in the modules that took its place, and warns.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable


def moved(old: str, *new: str) -> Callable[[str], object]:
    """A ``__getattr__`` for the module ``old``, whose names are in the modules ``new`` now."""

    def look(name: str) -> object:
        for place in new:
            found = getattr(importlib.import_module(place), name, look)
            if found is not look:
                if not name.startswith("__"):
                    warnings.warn(f"{old}.{name} has moved to {place}.{name}", DeprecationWarning, stacklevel=2)
                return found
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return look
