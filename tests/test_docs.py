"""The documentation holds: its examples run, its links lead somewhere, and it names what exists."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import llama
from typer.main import get_command
from typer.testing import CliRunner

import quantkit
from quantkit import calibrators
from quantkit.cli.app import app
from quantkit.integrations.transformers.models import SMOLLM2, load_float
from quantkit.ops import table

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
EXAMPLES = {
    f"{page.name}: {match[1]}": code
    for page in PAGES
    for language, code in FENCE.findall(page.read_text(encoding="utf-8"))
    if language == "python" and (match := re.match(r"# test: (\S+)\n", code))
}


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The fragments that its headings can be linked by."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_examples_are_found() -> None:
    assert {"README.md: quickstart", "README.md: module", "calibrators.md: calibrator"} <= EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example stands alone; the quick start may take ``model`` for granted, and the tutorial a ``path``.

    What it registers is forgotten afterwards.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrators, "_methods", {**calibrators._methods})
    monkeypatch.setattr(table, "_BACKENDS", [*table._BACKENDS])
    given: dict[str, Any] = {"model": llama()} if name == "README.md: quickstart" else {}
    if name == "llama.md: llama":
        given["path"] = smollm2(tmp_path / "SmolLM2")
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "__main__", **given})


def smollm2(folder: Path) -> Path:
    """The embedded model as a folder of transformers."""
    for part in load_float(SMOLLM2, dtype="bfloat16"):
        part.save_pretrained(folder)
    return folder


def test_the_tutorial_shows_both_smoothings_equal() -> None:
    spec = importlib.util.spec_from_file_location("nanogpt", ROOT / "docs" / "tutorials" / "nanogpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = module.main(steps=10)
    assert results["by hand against quantkit"] < 1e-6
    assert all(abs(loss - results["fp32"]) < 0.01 for name, loss in results.items() if name != "by hand against quantkit")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for groups in LINK.findall(prose(page)):
        target = next(filter(None, groups))
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = page if not path else page.parent / path
        assert file.exists(), f"{page.name} links to {target}"
        assert not fragment or fragment in anchors(file), f"{page.name} links to {target}, which has no such heading"


PAST = ("CHANGELOG.md", "rejected.md")
"""Pages that tell of what once was."""
TODAY = [page for page in PAGES if page.name not in PAST]
ABOUT_CODE = [page for page in TODAY if page.name in ("reading-the-code.md", "extending.md")]
GROUPS = ("quantkit.methods", "quantkit.backends")
"""Entry points, which look like names in the package."""


def spans(page: Path) -> list[str]:
    """What stands between backquotes on a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@pytest.mark.parametrize("page", TODAY, ids=lambda page: page.name)
def test_files_that_pages_name_exist(page: Path) -> None:
    """``ops/table.py`` is how the path of some file ends; ``NAME.py`` stands for a new one."""
    named = [
        path for span in spans(page) for path in re.findall(r"(?<![\w./-])[\w./-]+\.(?:py|c)\b", span) if "NAME" not in path
    ]
    folders = ("quantkit", "tests", "benchmarks", "docs")
    files = [f"/{file.relative_to(ROOT).as_posix()}" for folder in folders for file in (ROOT / folder).rglob("*.*")]
    missing = [path for path in named if not any(file.endswith(f"/{path}") for file in files)]
    assert not missing


@pytest.mark.parametrize("page", TODAY, ids=lambda page: page.name)
def test_names_that_pages_use_exist(page: Path) -> None:
    """``quantkit.core.formats`` and the like can be imported."""
    named = {name for span in spans(page) for name in re.findall(r"(?<![\w./-])quantkit(?:\.[A-Za-z_]\w*)+", span)}
    for name in sorted(named.difference(GROUPS)):
        if not name.endswith(".json"):
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", ABOUT_CODE, ids=lambda page: page.name)
def test_functions_that_pages_name_exist(page: Path) -> None:
    """``name()`` and ``Class.name()`` are defined somewhere in the package."""
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "quantkit").rglob("*.py"))
    defined = set(re.findall(r"^\s*(?:def|class) (\w+)", source, re.MULTILINE))
    named = {part for span in spans(page) for name in re.findall(r"([\w.]+)\(", span) for part in name.split(".")}
    assert named - defined - {"quantkit"} == set()


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    missing = [page for page in pages if page != "index.md" and f"({page})" not in index]
    assert not missing


PUBLIC = [*quantkit.__all__, "QuantKitConfig"]


@pytest.mark.parametrize("name", PUBLIC)
def test_api_reference_has(name: str) -> None:
    headings = re.findall(r"^### `([\w.]+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings.count(name) == 1


def test_api_reference_has_nothing_else() -> None:
    headings = re.findall(r"^### `([\w.]+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(PUBLIC)


def test_generated_tables_are_marked() -> None:
    """``benchmarks/report.py`` fills what stands between these comments."""
    for page in PAGES:
        marks = re.findall(r"<!-- (/?)results:([\w-]+) -->", prose(page))
        opened = [name for close, name in marks if not close]
        assert marks == [mark for name in opened for mark in (("", name), ("/", name))], page.name


def test_generated_tables_show_the_recorded_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"stale (run benchmarks/report.py): {done.stdout}{done.stderr}"


def sections(page: Path) -> dict[str, str]:
    """``## quantkit COMMAND`` -> its text."""
    parts = re.split(r"^## `quantkit (\w+)`$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def test_cli_page_has_every_command() -> None:
    assert sorted(sections(ROOT / "docs" / "cli.md")) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_options(command: str) -> None:
    """The options in the page are those in ``--help``, neither more nor fewer."""
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    option = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
    shown = set(option.findall(re.sub(r"\x1b\[[0-9;]*m", "", result.output)))
    written = set(option.findall(sections(ROOT / "docs" / "cli.md")[command]))
    assert written | {"--help", "--no-quick"} == shown | {"--help", "--no-quick"}
