"""Arrows between rooms run one way, nothing runs in circles, and what is private stays in its room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import house
import pytest
from house import House, circles

import quantkit

HOUSE = House(Path(quantkit.__file__).parent)

EXPLAINED: dict[tuple[str, str], str] = {}
"""Imports against the order that have to be: (file, file that it imports) -> why. Empty is how it should be."""


def test_every_room_is_in_the_table() -> None:
    assert HOUSE.unknown == set()


def test_imports_run_one_way() -> None:
    against = [found for found in HOUSE.against_the_order() if (found.source, found.target) not in EXPLAINED]
    assert not against, "\n".join(map(str, against))
    assert EXPLAINED.keys() <= {(found.source, found.target) for found in HOUSE.imports}, "explained, and not there"


def test_no_circles() -> None:
    found = [*HOUSE.circles_of_rooms(), *HOUSE.circles_of_files()]
    assert not found, "\n".join(map(" -> ".join, found))


def test_private_names_stay_in_their_room() -> None:
    assert not HOUSE.private(), "\n".join(map(str, HOUSE.private()))


@pytest.fixture
def small(tmp_path: Path) -> House:
    """Three rooms in which everything is that there is to see."""
    for name, text in {
        "__init__": "from pkg.cli import run\nfrom pkg.core.a import *\n",
        "core/__init__": "",
        "core/a": "from . import b\nfrom ..ops import _hidden\n"
        "class A:\n    def f(self, x, *y, z=1, **w):\n        import pkg\n",
        "core/b": "'''One file because it is long.'''\n" + "\n" * 500 + "def long():\n    '''Long.'''\n" + "    x = 1\n" * 70,
        "ops/__init__": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.core.a import A\n_hidden = 1\n",
        "cli": "import pkg.core.a\nfrom pkg import core as c\nimport torch\n"
        "def run():\n    from pkg.ops import _hidden\n    c.b._x\n",
    }.items():
        path = tmp_path / "pkg" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return House(tmp_path / "pkg")


def test_all_imports_are_seen(small: House) -> None:
    assert sorted(map(str, small.imports)) == [
        "__init__:1 -> cli.run",
        "__init__:2 -> core.a.*",
        "cli:1 -> core.a",
        "cli:2 -> core",
        "cli:5 -> ops._hidden (in a function)",
        "cli:6 -> core.b._x (in a function)",
        "core.a:1 -> core.b",
        "core.a:2 -> ops._hidden",
        "core.a:5 -> __init__ (in a function)",
        "ops:3 -> core.a.A (for types)",
    ]


def test_what_is_wrong_is_found(small: House) -> None:
    assert [str(i).split()[0] for i in small.against_the_order()] == ["__init__:1", "core.a:2", "core.a:5"]
    assert [str(i).split()[0] for i in small.private()] == ["cli:5", "cli:6", "core.a:2"]
    assert small.circles_of_rooms() == [["__init__", "core", "__init__"]]
    assert small.circles_of_files() == [["__init__", "core.a", "__init__"]]
    assert list(small.large()) == ["core.b.long: 72 lines"]
    assert [f.parameters for file in small.files for f in file.functions if f.where.endswith(".f")] == [4]


def test_circles() -> None:
    assert circles({("a", "b"), ("b", "c")}) == []
    two = {("a", "b"), ("b", "c"), ("c", "a"), ("c", "b"), ("x", "y"), ("y", "x")}
    assert circles(two) == [["b", "c", "b"], ["x", "y", "x"]]


def test_the_program_describes_any_package(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "numerics.py").write_text("def f():\n    pass\n")
    command = [sys.executable, house.__file__, "--root", str(tmp_path / "old")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "in no order: numerics" in said
    assert "circles of files: 0" in said
