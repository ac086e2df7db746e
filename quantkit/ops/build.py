"""Compiles C of ours at first use: once for this compiler, source and processor, then from a cache.

A library runs with the rights of whoever loads it, so the cache has to be a folder of one's own that nobody else may write. The
name of a library ends with the SHA-256 of its bytes: one that was truncated or changed is built again.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

log = logging.getLogger("quantkit")
T = TypeVar("T")

PATIENCE = 60.0
"""Seconds for one run of the compiler; one or two are the rule."""


class BuildError(Exception):
    """There is no library; the message says why, in words of the compiler or of the system."""


class NoCompilerError(BuildError):
    """There is no C compiler."""


class CompilerError(Exception):
    """The compiler cannot make a library of the source with some flags; the message is what it said."""


@dataclass(frozen=True)
class Source:
    """C that becomes one library.

    Attributes:
        stem: with which names of files begin.
        file: what is compiled.
        included: what it includes of ours.
        flags: for the compiler, whatever it is.
        variants: more of them, of which the first that the compiler takes are used.
    """

    stem: str
    file: Path
    included: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    variants: tuple[tuple[str, ...], ...] = ((),)

    def load(self, opened: Callable[[Path], T]) -> T:
        """The library as ``opened`` loads it, which raises OSError where that is not possible.

        Raises:
            NoCompilerError: there is none.
            BuildError: it makes no library, or no folder can hold it.
        """
        compiler = _compiler()
        if not compiler:
            raise NoCompilerError("no C compiler found")
        why = "there is no folder for it"
        for folder in _folders():
            try:
                return self._loaded(folder, compiler, opened)
            except TimeoutError as error:
                why = str(error)
                break
            except (CompilerError, OSError) as error:  # the latter of a folder that is full, or from which no code may run
                why = str(error)
        raise BuildError(why.strip()[:500])

    def _loaded(self, folder: Path, compiler: list[str], opened: Callable[[Path], T]) -> T:
        """The library from a folder, built if it is not there, or not whole.

        Raises:
            CompilerError: the compiler makes none.
            TimeoutError: it does not end.
            OSError: the folder cannot be written, or no code may run from there.
        """
        said: list[str] = []
        texts = [file.read_text() for file in (self.file, *self.included)]
        for extra in self.variants:
            flags = (*self.flags, *extra)
            parts = "\0".join([*texts, *compiler, *flags, torch.__version__, _processor()])
            stem = f"{self.stem}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
            try:
                return opened(_whole(folder, stem) or _built(self.file, folder, stem, compiler, flags))
            except CompilerError as error:
                said.append(str(error))
        raise CompilerError(said[0])


def _compiler() -> list[str]:
    """The command that compiles C: ``CC``, which may have arguments as in ``ccache gcc``, or what there is."""
    if given := shlex.split(os.environ.get("CC", "")):
        return given
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return [found] if found else []


def _whole(folder: Path, stem: str) -> Path | None:
    """The library of this name in a folder if it is as it was written; others of this name are removed."""
    for file in sorted(folder.glob(f"{stem}-*.so")):
        if _is_own(file) and file.name == f"{stem}-{_digest(file)}.so":
            return file
        log.warning("%s was changed or truncated after it was built: it is built again", file)
        file.unlink(missing_ok=True)
    return None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _built(source: Path, folder: Path, stem: str, compiler: list[str], flags: Sequence[str]) -> Path:
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as place:
        objects, shared = Path(place, "built.o"), Path(place, "built.so")
        _run([*compiler, *flags, "-c", str(source), "-o", str(objects)], Path(place))
        _run([*compiler, "-shared", str(objects), "-o", str(shared)], Path(place))
        shared.chmod(0o700)
        with shared.open("rb") as handle:
            os.fsync(handle.fileno())
        target = folder / f"{stem}-{_digest(shared)}.so"
        os.replace(shared, target)  # two processes may build at once: the last one wins, with the same bytes
    return target


def _run(command: list[str], place: Path) -> None:
    """Run a command whose output goes to a file: pipes would stay open where only the first of several processes ends."""
    with (place / "said").open("w+") as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)
        except OSError as error:
            raise CompilerError(f"{command[0]}: {error}") from None
        try:
            code = process.wait(PATIENCE)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(
                    f"{shlex.join(command)} did not end within {PATIENCE:.0f} s: set CC, or QUANTKIT_NATIVE=0"
                ) from None
            raise
        if code:
            said.seek(0)
            raise CompilerError(said.read() or f"{shlex.join(command)} ended with {code}")


# ---- folders


def _folders() -> Iterator[Path]:
    """Where the library may be, in this order: the cache of the user; a folder for temporary files, where a home is
    read-only or runs no code; and at last one for this process alone."""
    own = os.environ.get("QUANTKIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "quantkit")
    temporary = Path(tempfile.gettempdir(), f"quantkit-{os.getuid() if hasattr(os, 'getuid') else 'cache'}")
    makers: list[Callable[[], Path]] = [lambda: _made(Path(own)), lambda: _made(temporary), _private_folder]
    for make in makers:
        try:
            yield make()
        except OSError as error:
            log.info("what quantkit compiles is not cached there: %s", error)


def _made(folder: Path) -> Path:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is read-only")
    if not _is_own(folder):
        raise PermissionError(f"{folder} is not yours, or others may write to it: chmod go-w, or set QUANTKIT_CACHE")
    return folder


def _is_own(place: Path) -> bool:
    """Whether a file or folder, and no link, belongs to the user of this process and nobody else may write to it."""
    facts = place.lstat()
    if not hasattr(os, "getuid"):
        return True
    return facts.st_uid == os.getuid() and not facts.st_mode & 0o022 and not stat.S_ISLNK(facts.st_mode)


@functools.cache
def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="quantkit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor()
