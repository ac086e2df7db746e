"""The documentation holds: its examples run, its links lead somewhere, and it names what exists."""

from __future__ import annotations

import enum
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama, tokens, write_llama
from pages import README, ROOT, examples, links, prose
from typer.main import get_command
from typer.testing import CliRunner

import quantkit
from quantkit import calibrators
from quantkit.cli.app import app
from quantkit.core import formats
from quantkit.integrations.transformers.models import SMOLLM2, load_float
from quantkit.ops import table

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
EXAMPLES = {f"{page.name}: {name}": code for page in PAGES for name, code in examples(page).items()}


def text_of(page: Path) -> str:
    """A page without its code blocks."""
    return prose(page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The fragments that its headings can be linked by."""
    heads = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_examples_are_found() -> None:
    assert {"README.md: llama", "README.md: module", "calibrators.md: calibrator"} <= EXAMPLES.keys()


def test_all_of_the_readme_runs() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("```python\n") == text.count("```python\n# test: ")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example stands alone, but for the ``path`` of a Llama. What it registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrators, "_methods", {**calibrators._methods})
    monkeypatch.setattr(table, "_BACKENDS", [*table._BACKENDS])
    folders = {"README.md: llama": write_llama, "llama.md: llama": smollm2}
    given = {"path": folders[name](tmp_path / "float")} if name in folders else {}
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
    for target in links(page.read_text(encoding="utf-8")):
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
    return re.findall(r"`([^`\n]+)`", text_of(page))


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


def entries() -> dict[str, tuple[str, str]]:
    """Public name -> what stands behind it in the heading of its entry in the API reference, and the text below."""
    parts = re.split(r"^##+ (.+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [(re.fullmatch(r"`(\w+)(.*)`", head), text) for head, text in zip(parts[1::2], parts[2::2], strict=True)]
    return {match[1]: (match[2], text) for match, text in found if match}


ENTRIES = entries()
BY_HAND = {"QuantKitConfig": 8}
"""How many arguments people write, where a function has more: those of a config that was saved."""


def is_dataclass(thing: Any) -> bool:
    """Not because a class of another library is one that it inherits from."""
    return "__dataclass_fields__" in vars(thing)


def parameters(thing: Any) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter; of dataclasses, those that their fields are."""
    if not is_dataclass(thing):
        return [(p.name, p.kind, p.default) for p in inspect.signature(thing).parameters.values()]
    made = {f.name: f.default_factory() for f in fields(thing) if f.default_factory is not MISSING}
    given = {f.name: inspect.Parameter.empty if f.default is MISSING else f.default for f in fields(thing) if f.init}
    return [(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, value) for name, value in (given | made).items()]


@pytest.mark.parametrize("name", [name for name, (signature, _) in ENTRIES.items() if signature])
def test_api_reference_has_the_signature(name: str) -> None:
    namespace: dict[str, Any] = vars(formats) | {"Scheme": quantkit.Scheme}
    exec(f"def written{ENTRIES[name][0]}: ...", namespace)
    assert parameters(namespace["written"]) == parameters(getattr(quantkit, name))[: BY_HAND.get(name)]


def is_data(name: str) -> bool:
    thing = getattr(quantkit, name)
    return isinstance(thing, enum.EnumMeta) or (isinstance(thing, type) and is_dataclass(thing) and not hasattr(thing, "stage"))


@pytest.mark.parametrize("name", [name for name in PUBLIC if is_data(name)])
def test_api_reference_has_every_attribute(name: str) -> None:
    thing = getattr(quantkit, name)
    own = {*vars(thing), *(field.name for field in fields(thing))} if is_dataclass(thing) else set(thing.__members__)
    public = {attribute for attribute in own if not attribute.startswith("_")} - {"turned"}  # an old name
    missing = {attribute for attribute in public if not re.search(rf"\b{attribute}\b", " ".join(ENTRIES[name]))}
    assert not missing


EXPORTS = dict(re.findall(r"^\| `\"(\w+)\"` \|.*\| (\S+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE))
"""The first and the last column of the README's table of methods: how ``export`` takes a Llama that was quantized so."""


def test_lists_of_methods_are_whole() -> None:
    row = re.search(r"^\| `--method`.*$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row[0])) == set(EXPORTS) == set(calibrators._methods)


@pytest.mark.parametrize("method", EXPORTS)
def test_methods_export_as_the_readme_says(method: str, tmp_path: Path) -> None:
    model = llama(hidden_size=128)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight[:8] *= 50  # outlier channels
    quantkit.quantize(model, method, calibration=[tokens(length=32, seed=seed) for seed in range(4)], progress=False)
    ways: dict[str, Any] = {"yes": {}, '`rewrites="undo"`': {"rewrites": "undo"}, '`outliers="drop"`': {"outliers": "drop"}}
    assert next((way for way, options in ways.items() if exports(model, tmp_path / "out", **options)), "no") == EXPORTS[method]


def exports(model: Any, folder: Path, **options: Any) -> bool:
    try:
        return quantkit.export(model, folder, **options).is_dir()
    except quantkit.ModelError:
        return False


def test_generated_tables_are_marked() -> None:
    """``benchmarks/report.py`` fills what stands between these comments."""
    for page in PAGES:
        marks = re.findall(r"<!-- (/?)results:([\w-]+) -->", text_of(page))
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
