"""Where the C passes are built and kept: damaged, planted, hanging or read-only, no process is unsafe or slow."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit.ops import build
from quantkit.ops.cpu.native import library

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built once; tests have copies."""
    folder = tmp_path_factory.mktemp("built")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CC", raising=False)
        patch.setenv("QUANTKIT_CACHE", str(folder))
        return path_of(library.__wrapped__())


@pytest.fixture
def cache(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with the library in it; temporary files are beside it."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    (tmp_path / "tmp").mkdir()
    shutil.copy(built, folder)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("QUANTKIT_CACHE", str(folder))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "tmp"))
    build._private_folder.cache_clear()
    yield folder
    build._private_folder.cache_clear()


def the_library(folder: Path) -> Path:
    (file,) = folder.glob("native-*.so")
    return file


def path_of(lib: ctypes.CDLL | None) -> Path:
    assert lib is not None
    return Path(lib._name)


def test_it_is_kept_under_its_digest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = the_library(cache)
    assert build._digest(file) in file.name
    assert stat.S_IMODE(file.stat().st_mode) == 0o700
    assert list(cache.iterdir()) == [file]  # nothing else is left
    monkeypatch.setattr(build, "_built", None)  # so that building would fail
    assert path_of(library.__wrapped__()) == file


@pytest.mark.parametrize("size", [0, 1000, -1], ids=["empty", "truncated", "one byte short"])
def test_a_damaged_one_is_built_again(size: int, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Truncated, it gave SIGBUS in every process for ever; empty, it chose the slow flags for good."""
    file = the_library(cache)
    whole = file.read_bytes()
    file.unlink()  # it is mapped here
    file.write_bytes(whole[:size])
    file.chmod(0o700)
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        assert path_of(library.__wrapped__()) == file
    assert file.read_bytes() == whole
    assert "was changed or truncated" in caplog.text


def test_a_flipped_bit_is_found(cache: Path) -> None:
    file = the_library(cache)
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.unlink()
    file.write_bytes(whole)
    assert path_of(library.__wrapped__()) == file
    assert build._digest(file) in file.name


@pytest.mark.parametrize("mode", [0o777, 0o770], ids=oct)
def test_a_folder_that_others_may_write_is_not_used(mode: int, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.chmod(mode)
    with caplog.at_level(logging.INFO, logger="quantkit"):
        place = path_of(library.__wrapped__()).parent
    assert place == cache.parent / "tmp" / f"quantkit-{os.getuid()}"
    assert "others may write to it" in caplog.text


def test_a_library_that_others_may_write_is_built_again(cache: Path) -> None:
    file = the_library(cache)
    file.chmod(0o777)
    path_of(library.__wrapped__())
    assert stat.S_IMODE(file.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else_is_not_used(cache: Path, tmp_path: Path) -> None:
    os.chown(cache, 12345, -1)
    planted = tmp_path / "tmp" / f"quantkit-{os.getuid()}"
    planted.mkdir()
    os.chown(planted, 12345, -1)
    place = path_of(library.__wrapped__()).parent
    assert place not in (cache, planted)
    assert place.name.startswith("quantkit-")
    assert place.stat().st_uid == os.getuid()


def test_a_cache_that_cannot_be_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a read-only home: all processes share one folder for temporary files."""
    monkeypatch.setenv("QUANTKIT_CACHE", "/proc/quantkit")
    places = [path_of(library.__wrapped__()) for _ in range(2)]
    assert places[0] == places[1]
    assert places[0].parent == cache.parent / "tmp" / f"quantkit-{os.getuid()}"


def test_folders_from_which_no_code_may_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the loader says on a file system that is mounted noexec."""
    real = ctypes.CDLL

    def refuse(name: str) -> ctypes.CDLL:
        if str(cache) in name:
            raise OSError(f"{name}: failed to map segment from shared object")
        return real(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert path_of(library.__wrapped__()).parent == cache.parent / "tmp" / f"quantkit-{os.getuid()}"


def compiler(folder: Path, text: str) -> Path:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_a_compiler_with_arguments(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CC="ccache gcc"."""
    wrapper = compiler(tmp_path, 'echo "$@" >> "$(dirname "$0")/calls"; exec "$@"')
    monkeypatch.setenv("CC", f"'{wrapper}' cc -g0")
    assert library.__wrapped__() is not None
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert all(call.startswith("cc -g0 ") for call in calls)
    assert len(list(cache.glob("*.so"))) == 2  # each compiler has its own


@pytest.mark.parametrize("text", ["exit 1", "echo no such option; exit 1", "kill -9 $$"])
def test_a_compiler_that_fails(text: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(compiler(tmp_path, text)))
    assert library.__wrapped__() is None
    monkeypatch.setenv("CC", str(tmp_path / "nowhere"))
    assert library.__wrapped__() is None
    assert len(list(cache.iterdir())) == 1


def test_a_compiler_that_hangs(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a child of its own, which holds the output open."""
    monkeypatch.setenv("CC", str(compiler(tmp_path, 'sleep 1000 & echo $! > "$(dirname "$0")/child"; wait')))
    monkeypatch.setattr(build, "PATIENCE", 0.5)
    start = time.monotonic()
    assert library.__wrapped__() is None
    assert time.monotonic() - start < 5  # and the other flags and folders are not tried
    assert "did not end within" in caplog.text
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "(sleep) Z" in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of the compiler is still there")
    assert len(list(cache.iterdir())) == 1


def test_many_processes_build_at_once(tmp_path: Path) -> None:
    code = "from quantkit.ops.cpu.native import library; assert library() is not None"
    environment = os.environ | {"QUANTKIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    the_library(tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
