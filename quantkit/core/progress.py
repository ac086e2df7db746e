"""How long work tells how far it is: a bar on the terminal, calls to a function of yours, or nothing.

Everything in quantkit that takes a while has an argument ``progress``, a :data:`Progress`. ``True`` shows bars, ``False`` shows
none, and ``None`` shows them if stderr is a terminal. A function is called instead of showing anything, so that a window, a
notebook or a log can show it in its own way: ``progress(what, done, total)``, first with ``done = 0`` when a piece of work
begins and then once for each item that is done. ``total`` is None where nobody knows it, as for a generator of batches. An
exception from that function ends the work in the way that any other exception would: before the model has changed, it is left
as it was.

The library that draws bars is imported when the first one is drawn, so that importing quantkit does not pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

Progress = bool | None | Callable[[str, int, int | None], None]
"""Bars or no bars, None to let the terminal decide, or a function of what is done, the items so far and the items in all."""

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, progress: Progress = None, unit: str = "it") -> Iterator[T]:
    """The same ``items``; each counts as done when the next one is asked for."""
    with counted(len(items) if isinstance(items, Sized) else None, what, progress, unit) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def counted(total: int | None, what: str, progress: Progress = None, unit: str = "it") -> Iterator[Callable[[], object]]:
    """For work that is no loop over items: gives a function to call after each of ``total`` items."""
    if callable(progress):
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            progress(what, done, total)

        progress(what, 0, total)
        yield advance
    elif progress or progress is None:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=what, unit=unit, disable=False if progress else None) as bar:  # None: ask the terminal
            yield bar.update
    else:
        yield lambda: None
