"""Cases that may crash or hang, in a process that may: forked once, and again whenever one was lost."""

from __future__ import annotations

import collections
import json
import os
import select
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE = 5.0
"""Seconds for one case; on a busy machine the clock is asked a second time before a case counts as hanging."""


def run_all(count: int, run: Callable[[int], str], right: tuple[str, ...], patience: float = PATIENCE) -> dict[str, Any]:
    """Run the cases 0 to ``count`` - 1.

    Args:
        count: how many.
        run: returns an outcome, one of ``right`` if all is well. Whatever it raises is wrong.
        right: outcomes that may be.
        patience: seconds for one case.

    Returns:
        How often each outcome came, and what was wrong, with the number of the case.
    """
    found, wrong = collections.Counter[str](), list[str]()
    for case, outcome in _outcomes(count, run, patience):
        found[outcome if outcome in right else "wrong"] += 1
        if outcome not in right:
            wrong.append(f"{case}: {outcome}")
    return {"cases": count, "outcomes": dict(found), "wrong": wrong}


def _outcomes(count: int, run: Callable[[int], str], patience: float) -> Iterator[tuple[int, str]]:
    case, twice = 0, False
    while case < count:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _work(writing, range(case, count), run)
        os.close(writing)
        for line in _lines(reading, patience):
            yield case, json.loads(line)
            case, twice = case + 1, False
        os.close(reading)
        late = case < count and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        if late:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if case < count:
            if late and not twice:
                twice = True  # once more, in a fresh process
                continue
            yield case, "hangs" if late else f"crashes with {signal.Signals(-code).name if code < 0 else code}"
            case, twice = case + 1, False


def _lines(handle: int, patience: float) -> Iterator[bytes]:
    """What comes in until the other side is gone, or nothing came for so long."""
    whole = b""
    while select.select([handle], [], [], patience)[0]:
        part = os.read(handle, 65536)
        if not part:
            return
        *lines, whole = (whole + part).split(b"\n")
        yield from lines


def _work(handle: int, cases: range, run: Callable[[int], str]) -> None:
    try:
        for case in cases:
            try:
                said = run(case)
            except BaseException as error:  # noqa: BLE001  that is what is looked for
                trace = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-5:]]
                said = f"raw {type(error).__name__}: {error} in {' '.join(trace)}"
            os.write(handle, json.dumps(said[:1000]).encode() + b"\n")
    finally:
        os._exit(0)
