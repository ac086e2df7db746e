"""Folders that appear whole or not at all, whatever the place, the disk, other writers and killed ones do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import llama, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import quantkit
from quantkit import CheckpointError
from quantkit.checkpoint import files
from quantkit.checkpoint.files import as_one, old_copies, written_whole
from quantkit.checkpoint.save import check_place

RECORD = "quantkit.json"


def write(target: Path, text: str = "new", nbytes: int = 0) -> None:
    with written_whole(target, lambda place: (place / "mark").is_file(), "folder of ours", nbytes) as folder:
        (folder / "mark").write_text(text)
        (folder / "below").mkdir()
        (folder / "below" / "deeper").write_text(text)


def beside(target: Path) -> list[str]:
    return sorted(place.name for place in target.parent.iterdir())


@pytest.fixture(params=["in one step", "in two steps"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Also as on file systems where two folders cannot change places in one step."""
    if request.param == "in two steps":
        monkeypatch.setattr(files, "_exchanged", lambda folder, target: False)
    return str(request.param)


@pytest.mark.usefixtures("steps")
def test_new_empty_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        write(target, text)
        assert (target / "mark").read_text() == (target / "below" / "deeper").read_text() == text
        assert beside(target) == ["out"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert (tmp_path / "empty" / "mark").is_file()


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=repr)
def test_a_failed_exchange_leaves_the_old_folder(tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    write(target, "old")
    real = os.rename

    def rename(source: Path, place: Path) -> None:
        if Path(place) == target and files.OLD not in Path(source).name:
            raise error
        real(source, place)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(files, "_exchanged", lambda folder, target: False)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write(target)
    assert (target / "mark").read_text() == "old"
    assert beside(target) == ["out"]


def test_foreign_folders_and_files_stay(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(CheckpointError, match=f"{name} exists and is no folder of ours"):
            write(tmp_path / name)
    assert beside(tmp_path / "file") == ["file", "thesis"]


def test_what_became_foreign_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write_late() -> None:
        with written_whole(target, lambda place: False, "folder of ours") as folder:
            (folder / "mark").write_text("new")
            target.mkdir()
            (target / "thesis.tex").write_text("years of work")

    with pytest.raises(CheckpointError, match="out exists and is no folder of ours"):
        write_late()
    assert [place.name for place in target.iterdir()] == ["thesis.tex"]
    assert beside(target) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    place, link = tmp_path / "disk" / "real", tmp_path / "link"
    place.parent.mkdir()
    link.symlink_to(place)  # to nothing yet
    for text in ("first", "second"):
        write(link, text)
        assert link.is_symlink()
        assert (place / "mark").read_text() == text
    assert beside(place) == ["real"]


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (Path(), Path("../") / tmp_path.name):
        with pytest.raises(CheckpointError, match="is the current folder, which cannot be replaced: name a folder inside it"):
            write(target)
    write(Path("inside"))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/proc", "exists and is no"),
        ("/dev/shm", "is a mount point|exists and is no"),
        ("/proc/quantkit/out", "cannot be written"),
        ("n" * 300, "cannot be written: .*too long"),
    ],
    ids=["foreign", "mount point", "read-only", "long name"],
)
def test_places_that_cannot_be_written(place: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        write(tmp_path / place)
    if place != "/proc/quantkit/out":  # for root, only trying tells
        with pytest.raises(CheckpointError, match=words):
            check_place(tmp_path / place)


def test_the_longest_name_that_the_system_takes(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    write(target, "first")
    write(target, "second")
    assert (target / "mark").read_text() == "second"
    assert beside(target) == ["n" * 255]


def test_no_room_is_known_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs \d+ MiB, and \d+ MiB are free: nothing was written"):
        write(tmp_path / "out", nbytes=2**60)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_old_folder(tmp_path: Path) -> None:
    """As on a full disk, the system refuses in the middle of a file; a process of its own, since this cannot be taken back."""
    target = tmp_path / "out"
    write(target, "old")
    code = f"""
import resource, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
from pathlib import Path
from test_folders import write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write(Path({str(target)!r}), "x" * 5000)
except Exception as error:
    print(type(error).__name__, error)
"""
    ended = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(f"CheckpointError {target} cannot be written: "), ended
    assert (target / "mark").read_text() == "old"
    assert beside(target) == ["out"]


def test_what_killed_saves_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target)
    gone = [".out.quantkit-abcd1234", ".out.quantkit-wxyz5678.old"]
    kept = [".out.quantkit-abcd1234.mine", ".out2.quantkit-abcd1234", ".out.abcd1234", "out.quantkit-abcd1234"]
    for name in [*gone, *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half of it")
    write(target)
    assert beside(target) == sorted([*kept, "out"])


def test_what_another_writer_is_writing_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with written_whole(target, lambda place: True, "folder of ours") as folder:
        (folder / "mark").write_text("slow")
        write(target, "fast")
        assert (target / "mark").read_text() == "fast"
        assert (folder / "mark").read_text() == "slow"
    assert (target / "mark").read_text() == "slow"
    assert beside(target) == ["out"]


def test_a_missing_target_names_the_whole_old_copy(tmp_path: Path) -> None:
    old = tmp_path / ".out.quantkit-abcd1234.old"
    old.mkdir()
    assert old_copies(tmp_path / "other") == ""
    for target in (tmp_path / "out", Path(os.path.relpath(tmp_path / "out"))):
        with pytest.raises(CheckpointError) as caught:
            quantkit.load(target)
        assert f"a save that was killed left the whole old one at {old}: rename it" in str(caught.value)


def replacing(folder: Path, times: int) -> Callable[[], list[str]]:
    """Reads two files of a folder, which is replaced in between this often."""
    left = [times]

    def read() -> list[str]:
        found = [(folder / "mark").read_text()]
        if left[0]:
            left[0] -= 1
            write(folder, f"{left[0]} left")
        return [*found, (folder / "below" / "deeper").read_text()]

    return read


def test_a_folder_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "first")
    assert as_one(target, replacing(target, 3)) == ["0 left", "0 left"]
    with pytest.raises(CheckpointError, match="is being replaced all the time"):
        as_one(target, replacing(target, 1000))


def test_an_error_counts_if_the_folder_is_the_same(tmp_path: Path) -> None:
    target, calls = tmp_path / "out", []
    write(target)

    def read() -> None:
        calls.append(0)
        if len(calls) < 3:
            write(target)
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        as_one(target, read)
    assert len(calls) == 3


# ---- links and files that are none


@pytest.mark.parametrize("name", ["a", "a b", "model-00001-of-00002.safetensors", "below/deeper", "x" * 200])
def test_names_of_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    assert files.inside(tmp_path, name, RECORD) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/../b", "a/b/c", "", ".", "..", "a/", "/", ".git/config", "a\nb", "a\0b", "a//b"]
)
def test_names_that_lead_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lists .*, a path outside the checkpoint: refused"):
        files.inside(tmp_path, name, RECORD)


@pytest.mark.parametrize("name", ["a", "below/a", "linked/a"])
def test_links_that_leave_a_folder(name: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "below").mkdir(parents=True)
    outside.mkdir()
    (outside / "a").write_text("secret")
    (folder / "linked").symlink_to(outside)
    for link in ("a", "below/a"):
        (folder / link).symlink_to(outside / "a")
    with pytest.raises(CheckpointError, match="is a link that leaves the checkpoint: refused"):
        files.inside(folder, name, RECORD)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="is no plain file: refused"):
        files.read_object(tmp_path, "config.json")


# ---- tokenizers


def test_several_chat_templates(tmp_path: Path) -> None:
    """transformers puts all but the first into a folder of their own."""
    words = Tokenizer(WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    model = quantkit.quantize(llama(), "rtn", calibration=[tokens()], progress=False)
    folder = quantkit.save(model, tmp_path / "out", tokenizer=tokenizer)
    for place in (folder, quantkit.export(folder, tmp_path / "export")):
        assert PreTrainedTokenizerFast.from_pretrained(place).chat_template == tokenizer.chat_template
        quantkit.load(place)
    template = next(file for file in folder.rglob("*.jinja") if file.parent != folder)
    template.write_text("{{ cycler.__init__ }}")
    with pytest.raises(CheckpointError, match=f"{template.name} (was changed|has 21 bytes)"):
        quantkit.load(folder)
