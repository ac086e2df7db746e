"""Packages that add to quantkit: what they offer is found by the entry points of their distributions.

A package that brings a method or a backend says so in its ``pyproject.toml``::

    [project.entry-points."quantkit.methods"]
    awq = "my_package.awq:AWQ"

Whoever installs it can then write ``method="awq"``. The package is imported when that name is used for the first time and not
before, so an installed package that is broken or slow to import costs nothing until somebody asks for it, and then the error
says which package it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from quantkit.core.errors import PluginError


@functools.cache
def plugins(group: str) -> dict[str, Callable[[], Any]]:
    """What installed packages offer in ``group``: name -> a function that imports it and returns the object.

    Nothing is imported by this call. The installed packages are looked through once for each group and process.

    Raises:
        PluginError: by such a function, where the import fails, or where two packages offer the same name.
    """
    offers: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        offers.setdefault(entry.name, []).append(entry)
    return {name: functools.partial(_load, group, name, entries) for name, entries in offers.items()}


def _load(group: str, name: str, entries: list[EntryPoint]) -> Any:
    packages = sorted({_package(entry) for entry in entries})
    if len(packages) > 1:
        raise PluginError(f"{group}: {' and '.join(packages)} both offer {name!r}: uninstall all but one")
    try:
        return entries[0].load()
    except Exception as error:  # a package may raise anything while it is imported
        raise PluginError(
            f"{group}: {name!r} of the package {packages[0]} cannot be imported from {entries[0].value!r} "
            f"({type(error).__name__}: {error}): upgrade or uninstall {packages[0]}"
        ) from error


def _package(entry: EntryPoint) -> str:
    return "of unknown name" if entry.dist is None else entry.dist.name
