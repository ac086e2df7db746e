"""Folders that appear whole or not at all, and files from strangers that are looked at before they are believed.

Whoever publishes a checkpoint chooses the names that its JSON lists. A name is therefore only ever that of a plain file in the
same folder or one below: no path that leads out, no link that does. JSON is read up to a size that no honest file exceeds.

Somebody may write a folder while somebody else reads it. Who reads compares the identity of the folder and of its files before
and after (:func:`as_one`). Who writes has a folder of their own, locked and beside the target, until all of it is on the disk;
then the two change places in one step where the system can do that. What a killed save leaves is known by its name, and by a
lock that nobody holds.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from quantkit.core.errors import CheckpointError
from quantkit.core.locks import HeldError, lock
from quantkit.core.text import read_text

T = TypeVar("T")
MAX_JSON_BYTES = 64 * 2**20
FILE_NAME = re.compile(r"[\w\- ][\w.\- ]{0,200}(/[\w\- ][\w.\- ]{0,200})?")
TRIES = 20
"""How often reading begins again because somebody replaced the folder meanwhile."""
EXCHANGE, HERE = 2, -100
"""``RENAME_EXCHANGE`` and ``AT_FDCWD`` of Linux."""


# ---- writing


def check_target(target: Path, ours: Callable[[Path], bool], what: str) -> None:
    """Refuse a folder that must not or cannot be written, as far as that can be known before any work.

    Args:
        target: the folder. Its parents need not exist.
        ours: whether a folder with something in it may be replaced as a whole.
        what: such a folder is, for the message.

    Raises:
        CheckpointError: it is something else, the current folder or a mount point, has too long a name, or its place cannot be
            written.
    """
    try:
        place = target.resolve()
        if place.exists():
            if not place.is_dir() or (any(place.iterdir()) and not ours(place)):
                raise CheckpointError(f"{target} exists and is no {what}: choose an empty or a new folder")
            if os.path.ismount(place):
                raise CheckpointError(f"{target} is a mount point, which cannot be replaced: name a folder inside it")
            if os.path.samestat(place.stat(), os.stat(".")):
                raise CheckpointError(f"{target} is the current folder, which cannot be replaced: name a folder inside it")
        above = next(folder for folder in place.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise CheckpointError(f"{target} cannot be written: {above} is no folder that you may write to")
    except OSError as error:  # a name that is too long, a loop of links, a folder that may not be read
        raise CheckpointError(f"{target} cannot be written: {error}") from error


@contextmanager
def written_whole(target: Path, ours: Callable[[Path], bool], what: str, nbytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place at the end, or vanishes if anything fails inside.

    Files and folders are on the disk before anything is replaced. A link to a folder stays, and what it points to is replaced.
    A folder that was there before comes back where the exchange itself fails.

    Args:
        target, ours, what: see :func:`check_target`, which is asked at the beginning and again before anything is replaced.
        nbytes: about how much will be written.

    Raises:
        CheckpointError: there is no room for so much, or the system refuses to write.
    """
    check_target(target, ours, what)
    place = target.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(place, PART)
        free = shutil.disk_usage(place.parent).free
        if nbytes > free:
            raise CheckpointError(
                f"{target} needs {nbytes / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free: nothing was written"
            )
        with _locked_folder(place) as folder:
            yield folder
            _sync(folder)
            check_target(target, ours, what)
            _put_in_place(folder, place)
        _remove_leftovers(place, PART, OLD)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


PART, OLD = "", ".old"
"""How the names of temporary folders end: of those that are being written, and of those that were moved out of the way."""


@contextmanager
def _locked_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, locked, which is removed at the end if it is still there."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_stem(target)}.quantkit-", dir=target.parent))
        try:
            held = lock(folder)
            break
        except (HeldError, FileNotFoundError):  # somebody took it for a leftover before it was locked
            continue
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def _stem(target: Path) -> str:
    """What the names of temporary folders of a target begin with; a name that leaves no room for more is hashed."""
    name = target.name
    return f".{name if len(os.fsencode(name)) < 200 else hashlib.sha256(os.fsencode(name)).hexdigest()}"


def _leftovers(target: Path, *kinds: str) -> list[Path]:
    """Temporary folders of these kinds beside ``target``: in use, or left by killed saves."""
    name = re.compile(rf"{re.escape(_stem(target))}\.quantkit-[a-z0-9_]{{8}}({'|'.join(map(re.escape, kinds))})")
    try:
        return [folder for folder in target.parent.iterdir() if name.fullmatch(folder.name) and folder.is_dir()]
    except OSError:
        return []


def _remove_leftovers(target: Path, *kinds: str) -> None:
    for folder in _leftovers(target, *kinds):
        try:
            held = lock(folder)
        except (HeldError, OSError):
            continue
        if held is not None:  # else nobody can say whether it is in use
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def _sync(folder: Path) -> None:
    """Have the disk take everything in a folder, and the folder itself."""
    for place in [*folder.rglob("*"), folder]:
        if place.is_dir() and sys.platform == "win32":
            continue  # has no handles of folders
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(folder: Path, target: Path) -> None:
    """Let ``folder`` take the place of ``target``; what was there is where ``folder`` was, or gone."""
    for _ in range(TRIES):  # another writer may come in between, and the last one wins
        try:
            if not _exchanged(folder, target):
                _moved_aside(folder, target)
            break
        except FileNotFoundError:
            if not folder.exists():
                raise
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    else:
        raise OSError(errno.EBUSY, "others replace it all the time", str(target))
    if sys.platform != "win32":
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _exchanged(folder: Path, target: Path) -> bool:
    """Whether two folders have changed places in one step, as Linux can on most file systems."""
    if not target.exists() or not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    return bool(rename(HERE, os.fsencode(folder), HERE, os.fsencode(target), EXCHANGE) == 0)


def _moved_aside(folder: Path, target: Path) -> None:
    old = folder.with_name(folder.name + OLD)
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(folder, target)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(old, ignore_errors=True)


# ---- reading


def old_copies(target: Path) -> str:
    """What to add to the message that ``target`` is missing: the whole copies beside it that a killed save left, if any."""
    whole = [str(folder) for folder in _leftovers(target.resolve(), OLD)]
    return f"; a save that was killed left the whole old one at {' and '.join(whole)}: rename it" if whole else ""


def identity(folder: Path) -> tuple[Any, ...] | None:
    """What a folder and its files are: another value once any of them was replaced or written. None if there is none."""
    try:
        # Network file systems have hidden names for files that are gone and still open.
        places = [folder, *sorted(place for place in folder.iterdir() if not place.name.startswith("."))]
        facts = [place.stat() for place in places]
    except OSError:
        return None
    return tuple((f.st_dev, f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for f in facts)


def as_one(folder: Path, read: Callable[[], T]) -> T:
    """What ``read()`` returns, all of one and the same ``folder``: if somebody replaces it meanwhile, it is read again.

    Raises:
        CheckpointError: what ``read`` raises of a folder that nobody replaced; or others replace it all the time.
    """
    for _ in range(TRIES):
        before = identity(folder)
        try:
            found = read()
        except CheckpointError:
            if identity(folder) == before:
                raise
        else:
            if identity(folder) == before:
                return found
        time.sleep(0.01)  # where a folder is replaced in two steps, there is none in between
    raise CheckpointError(f"{folder} is being replaced all the time: read it when its writers are done")


def inside(folder: Path, name: str, said_by: str) -> Path:
    """The file called ``name`` in ``folder``, where ``said_by`` is the file that lists this name.

    Raises:
        CheckpointError: the name leads out of the folder, the file is a link that does, or there is no such plain file.
    """
    file = folder / name
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{folder / said_by} lists {name!r}, a path outside the checkpoint: refused")
    if not file.resolve().is_relative_to(folder.resolve()) and not _is_hub_cache(folder, file):
        raise CheckpointError(f"{file} is a link that leaves the checkpoint: refused")
    if not file.is_file():
        raise CheckpointError(f"{file} is {'no plain file: refused' if file.exists() else 'missing'}")
    return file


def _is_hub_cache(folder: Path, file: Path) -> bool:
    """Whether a link is one that huggingface_hub makes: its snapshots are links into ``../../blobs`` of the same repository."""
    return folder.parent.name == "snapshots" and file.resolve().parent == (folder.parent.parent / "blobs").resolve()


def files_of(folder: Path) -> list[str]:
    """The names of all files in a folder, and in the folders in it."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: it is larger than :data:`MAX_JSON_BYTES`, or no JSON.
    """
    text = read_text(file, MAX_JSON_BYTES, CheckpointError)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file ``name`` of ``folder``.

    Raises:
        CheckpointError: there is no such file inside the folder, or it holds something else.
    """
    file = inside(folder, name, name)
    body = read_json(file)
    if not isinstance(body, dict):
        raise CheckpointError(f"{file} is damaged: it holds no JSON object")
    return body


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
