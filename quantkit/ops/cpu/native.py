"""Builds and binds ``native.c``: the passes around the integer product that eager PyTorch has no fused operator for.

Like Triton's and Inductor's own launchers it is compiled at first use (about a second, then cached for this compiler, source
and processor). Without a C compiler, or with ``QUANTKIT_NATIVE=0``, the same arithmetic runs on PyTorch's operators.

A library runs with the rights of whoever loads it, so the cache has to be a folder of one's own that nobody else may write. The
name of a library ends with the SHA-256 of its bytes: one that was truncated or changed is built again.
"""

from __future__ import annotations

import atexit
import ctypes
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
from pathlib import Path

import torch

log = logging.getLogger("quantkit")

SOURCE, INCLUDED = Path(__file__).with_name("native.c"), Path(__file__).with_name("program.c")
# No -ffast-math and no contraction: results equal numerics.py bit for bit.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# torch's OpenMP runtime is loaded already and must stay the only one: compile for it, but link no other.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",))
PATIENCE = 60.0
"""Seconds for one run of the compiler; one or two are the rule."""
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "quantkit_quantize": (POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, FLOAT, INT, INT),
    "quantkit_group": (*[POINTER] * 4, LONG, POINTER, LONG, POINTER, LONG, LONG, INT),
    "quantkit_finish": (POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, INT, INT),
    "quantkit_token": (*[POINTER] * 8, LONG, LONG, FLOAT, INT, INT),
    "quantkit_run": (POINTER, LONG, INT),
}

RESULTS = {"quantkit_finish": None, "quantkit_group": None, "quantkit_run": LONG}

TILE = 64
"""``factors`` of a rewrite are padded to a multiple of this."""


class Rewrite(ctypes.Structure):
    """``struct rewrite``: addresses of ``[K]`` vectors, whose tensors the caller keeps alive, or None."""

    _fields_ = (("order", POINTER), ("shift", POINTER), ("scale", POINTER), ("factors", POINTER), ("block", LONG))


class Groups(ctypes.Structure):
    """``struct groups``: addresses of sizes int64 and shares float32, ``[G]``, and of multipliers of rows ``[G, N]`` int32."""

    _fields_ = (("count", LONG), ("sizes", POINTER), ("shares", POINTER), ("row_multipliers", POINTER))


class CompilerError(Exception):
    """The compiler cannot make a library of the source with some flags; the message is what it said."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be built or loaded; says once why."""
    if os.environ.get("QUANTKIT_NATIVE") == "0":
        log.info("QUANTKIT_NATIVE=0: INT8 layers run on PyTorch's own operators, slower for few tokens")
        return None
    compiler = _compiler()
    if not compiler:
        log.info("no C compiler found: INT8 layers run on PyTorch's own operators, slower for few tokens")
        return None
    why = "there is no folder for it"
    for folder in _folders():
        try:
            return _bind(_library_in(folder, compiler))
        except TimeoutError as error:
            why = str(error)
            break
        except (CompilerError, OSError) as error:  # the latter of a folder that is full, or from which no code may run
            why = str(error)
    log.warning("the CPU kernels could not be built, so PyTorch's own operators run: %s", why.strip()[:500])
    return None


def _bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    for name, types in SIGNATURES.items():
        getattr(lib, name).argtypes = types
        getattr(lib, name).restype = RESULTS.get(name, INT)
    return lib


# ---- building


def _compiler() -> list[str]:
    """The command that compiles C: ``CC``, which may have arguments as in ``ccache gcc``, or what there is."""
    if given := shlex.split(os.environ.get("CC", "")):
        return given
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return [found] if found else []


def _library_in(folder: Path, compiler: list[str]) -> ctypes.CDLL:
    """The library from a folder, built if it is not there, or not whole.

    Raises:
        CompilerError: the compiler makes none.
        TimeoutError: it does not end.
        OSError: the folder cannot be written, or no code may run from there.
    """
    said: list[str] = []
    for extra in VARIANTS:
        flags = (*FLAGS, *extra)
        parts = "\0".join([SOURCE.read_text(), INCLUDED.read_text(), *compiler, *flags, torch.__version__, _processor()])
        stem = f"native-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
        try:
            return ctypes.CDLL(str(_whole(folder, stem) or _built(folder, stem, compiler, flags)))
        except CompilerError as error:
            said.append(str(error))
    raise CompilerError(said[0])


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


def _built(folder: Path, stem: str, compiler: list[str], flags: Sequence[str]) -> Path:
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as place:
        objects, shared = Path(place, "native.o"), Path(place, "native.so")
        _run([*compiler, *flags, "-c", str(SOURCE), "-o", str(objects)], Path(place))
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
            log.info("the CPU kernels are not cached there: %s", error)


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
