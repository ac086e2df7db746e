"""Locks of folders between processes, which end with the process that holds them, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class HeldError(Exception):
    """Another process, or another part of this one, holds the lock."""


def lock(folder: Path) -> int | None:
    """A handle that locks a folder until it is closed with ``os.close``; None where the system or the disk has no locks.

    Raises:
        HeldError: somebody holds it.
        OSError: there is no such folder, not any more, or it may not be read.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise HeldError(str(folder)) from None
    except OSError:  # some network file systems have none
        os.close(handle)
        return None
    try:
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    except OSError:
        pass
    os.close(handle)
    raise FileNotFoundError(f"{folder} was removed before it was locked")
