#!/usr/bin/env python3
"""The house in figures: which room of the package looks into which other one, and how large everything is.

A *room* is a folder at the top of the package, or a file there. The order of rooms is the table below, and a room may import
rooms that stand before it. This program reads the source without running it, so it sees every import: those at the top of a
file, those inside of functions, which only run later, and those for type checkers, which never run. All of them tie two files
together for whoever wants to change one.

It prints the rooms with their sizes, the arrows between them, circles, imports against the order, private names that are used
in another room, and what is large without saying why. ``tests/test_house.py`` holds the package to the rules. A package whose
rooms are not in the table, such as an older version, is described without an order.
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

ORDER = (
    "_version", "core", "model", "ops", "layers", "capture", "discovery", "calibration", "calibrators", "pipeline",
    "checkpoint", "integrations", "evaluation", "_old", "__init__", "cli", "__main__",
)  # fmt: skip
"""From the ground up: a room may import the rooms before it. ``_old`` holds the names of modules that
have moved; the two with one line each are the version and ``python -m``."""

KERNELS = ("ops", "gpu")
"""The folder in which large files and functions with many arguments need no reason."""

FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
"""What is larger than this says why: ``One file because ...`` in its docstring, or ``One function because ...`` in its own or
in a comment on its first lines."""


@dataclass(frozen=True, order=True)
class Import:
    """One name that one file takes from another one.

    Attributes:
        source, target: the two modules, without the name of the package; the package itself is ``__init__``.
        line: in the source.
        name: what is taken; empty for the whole module.
        when: ``""`` at the top of the file, ``"in a function"`` or ``"for types"``.
    """

    source: str
    target: str
    line: int
    name: str = ""
    when: str = ""

    @property
    def rooms(self) -> tuple[str, str]:
        return room(self.source), room(self.target)

    @property
    def is_private(self) -> bool:
        return self.name.startswith("_") and not self.name.startswith("__")

    def __str__(self) -> str:
        what = f"{self.target}.{self.name}" if self.name else self.target
        return f"{self.source}:{self.line} -> {what}{f' ({self.when})' if self.when else ''}"


@dataclass(frozen=True)
class Function:
    """A function or method: where it is, how many lines and parameters it has, and whether it says why it is one."""

    where: str
    lines: int
    parameters: int
    explained: bool


@dataclass
class File:
    """One file of the package, read but not run."""

    module: str
    lines: int
    explained: bool
    imports: list[Import] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)

    @property
    def is_kernel(self) -> bool:
        return tuple(self.module.split(".")[: len(KERNELS)]) == KERNELS


def room(module: str) -> str:
    """The room that a module belongs to: ``"ops.cpu.native"`` is in ``"ops"``."""
    return module.split(".")[0]


class House:
    """All files of a package and what they import from each other."""

    def __init__(self, root: Path) -> None:
        paths = {self._module(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))}
        self.package, self.modules = root.name, frozenset(paths)
        self.files = [_Reader(self.package, self.modules, module, path).file for module, path in paths.items()]

    @staticmethod
    def _module(path: Path) -> str:
        parts = path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    @cached_property
    def imports(self) -> list[Import]:
        """Between two files, in the order of files and lines."""
        return [found for file in self.files for found in file.imports if found.source != found.target]

    @cached_property
    def rooms(self) -> dict[str, list[File]]:
        """In the order of the table, or by name if the table does not know one of them."""
        names = {room(module) for module in self.modules}
        ordered = [name for name in ORDER if name in names] if self.is_ordered else sorted(names)
        return {name: [file for file in self.files if room(file.module) == name] for name in ordered}

    @cached_property
    def unknown(self) -> set[str]:
        """Rooms that the table does not have."""
        return {room(module) for module in self.modules} - set(ORDER)

    @property
    def is_ordered(self) -> bool:
        return not self.unknown

    @cached_property
    def arrows(self) -> dict[tuple[str, str], Counter[str]]:
        """Room and room that it imports -> how many imports of each kind."""
        arrows: dict[tuple[str, str], Counter[str]] = {}
        for found in self.imports:
            if found.rooms[0] != found.rooms[1]:
                arrows.setdefault(found.rooms, Counter())[found.when] += 1
        return arrows

    def against_the_order(self) -> list[Import]:
        """Imports of rooms that stand later in the table."""
        return [i for i in self.imports if i.rooms[0] != i.rooms[1] and ORDER.index(i.rooms[1]) > ORDER.index(i.rooms[0])]

    def private(self) -> list[Import]:
        """Private names that are used in another room than their own."""
        return [found for found in self.imports if found.is_private and found.rooms[0] != found.rooms[1]]

    def private_within(self) -> list[Import]:
        """Private names that are used in another file of their own room."""
        return [found for found in self.imports if found.is_private and found.rooms[0] == found.rooms[1]]

    def circles_of_rooms(self) -> list[list[str]]:
        return circles(set(self.arrows))

    def circles_of_files(self) -> list[list[str]]:
        return circles({(found.source, found.target) for found in self.imports})

    def large(self) -> Iterator[str]:
        """What is larger than the bounds and does not say why, beside kernels."""
        for file in self.files:
            if file.is_kernel:
                continue
            if file.lines > FILE_LINES and not file.explained:
                yield f"{file.module}: {file.lines} lines"
            for function in file.functions:
                faults = [f"{function.lines} lines"] * (function.lines > FUNCTION_LINES)
                faults += [f"{function.parameters} parameters"] * (function.parameters > PARAMETERS)
                if faults and not function.explained:
                    yield f"{function.where}: {', '.join(faults)}"


class _Reader(ast.NodeVisitor):
    """Fills one :class:`File`."""

    def __init__(self, package: str, modules: frozenset[str], module: str, path: Path) -> None:
        self.package, self.modules, self.names, self.when = package, modules, [module], ""
        self.is_package = path.name == "__init__.py"
        self.aliases: dict[str, str] = {}
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.lines = text.splitlines()
        self.file = File(module, len(text.splitlines()), "One file because" in (ast.get_docstring(tree) or ""))
        self.visit(tree)

    def _reason(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether a function says why it is one: in its docstring, or in a comment before its first statement after that."""
        first = next((s for s in node.body if not isinstance(s, ast.Expr)), node.body[-1])
        return "One function because" in "\n".join(self.lines[node.lineno - 1 : first.lineno])

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == self.package:
                module = self._module(alias.name)
                self._add(node, module)
                self.aliases[alias.asname or self.package] = module if alias.asname else "__init__"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        start = node.module or ""
        if node.level:
            here = [] if self.file.module == "__init__" else self.file.module.split(".")
            up = node.level - self.is_package
            start = ".".join([self.package, *here[: len(here) - up], *filter(None, [node.module])])
        if start.split(".")[0] != self.package:
            return
        for alias in node.names:
            inner = f"{start}.{alias.name}".partition(".")[2]
            if inner in self.modules:
                self._add(node, inner)
                self.aliases[alias.asname or alias.name] = inner
            else:
                self._add(node, self._module(start), alias.name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """A private name of a module: ``module._name``."""
        parts = [node.attr]
        value = node.value
        while isinstance(value, ast.Attribute):
            parts.insert(0, value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id in self.aliases:
            module = self.aliases[value.id]
            while len(parts) > 1:
                inner = parts[0] if module == "__init__" else f"{module}.{parts[0]}"
                if not any(known == inner or known.startswith(f"{inner}.") for known in self.modules):
                    break
                module = inner
                del parts[0]
            if parts[0].startswith("_") and not parts[0].startswith("__"):
                self._add(node, module, parts[0])
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        before = self.when
        if "TYPE_CHECKING" in ast.unparse(node.test):
            self.when = "for types"
        for child in (node.test, *node.body):
            self.visit(child)
        self.when = before
        for child in node.orelse:
            self.visit(child)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.names.append(node.name)
        given = node.args
        parameters = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
        self.file.functions.append(
            Function(
                ".".join(self.names),
                (node.end_lineno or node.lineno) - node.lineno + 1,
                len([name for name in parameters if name not in ("self", "cls")]),
                self._reason(node),
            )
        )
        before, self.when = self.when, self.when or "in a function"
        self.generic_visit(node)
        self.when = before
        self.names.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815  the name that ast looks for

    def _module(self, name: str) -> str:
        """Without the package, and as far as there are files."""
        parts = name.split(".")[1:]
        while parts and ".".join(parts) not in self.modules:
            parts.pop()
        return ".".join(parts) or "__init__"

    def _add(self, node: ast.AST, target: str, name: str = "") -> None:
        self.file.imports.append(Import(self.file.module, target, getattr(node, "lineno", 0), name, self.when))


def circles(arrows: set[tuple[str, str]]) -> list[list[str]]:
    """For each set of nodes that reach each other, one shortest way around, its first node repeated at the end."""
    after: dict[str, set[str]] = {}
    for start, end in sorted(arrows):
        after.setdefault(start, set()).add(end)
    reached = {node: _reachable(after, node) for node in after}
    left, found = sorted(node for node in after if node in reached[node]), []
    while left:
        together = [node for node in left if node in reached[left[0]] and left[0] in reached[node]]
        found.append(min((_around(after, node) for node in together), key=len))
        left = [node for node in left if node not in together]
    return found


def _reachable(after: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in after.get(waiting.pop(), set()) - seen:
            seen.add(node)
            waiting.append(node)
    return seen


def _around(after: dict[str, set[str]], start: str) -> list[str]:
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:  # grows while it is walked: nearest first
        for node in sorted(after.get(way[-1], set())):
            if node == start:
                return [*way, start]
            if node not in seen:
                seen.add(node)
                ways.append([*way, node])
    raise AssertionError(f"{start} is on no circle")


def describe(house: House) -> Iterator[str]:
    """The report, line by line."""
    total = sum(file.lines for file in house.files)
    yield f"{house.package}: {len(house.rooms)} rooms, {len(house.files)} files, {total} lines"
    yield ""
    yield "rooms" if house.is_ordered else f"rooms (in no order: {', '.join(sorted(house.unknown))} are not in the table)"
    for name, files in house.rooms.items():
        looks = [f"{end}{_kinds(kinds)}" for (start, end), kinds in house.arrows.items() if start == name]
        size = f"{len(files):>4} files {sum(file.lines for file in files):>6} lines"
        yield f"  {name:<16}{size}  -> {', '.join(sorted(looks)) or 'nothing'}"
    against = house.against_the_order() if house.is_ordered else []
    yield from _section("circles of rooms", [" -> ".join(circle) for circle in house.circles_of_rooms()])
    yield from _section("circles of files", [" -> ".join(circle) for circle in house.circles_of_files()])
    if house.is_ordered:
        yield from _section("imports against the order", [str(found) for found in against])
    yield from _section("private names in another room", [str(found) for found in house.private()])
    yield from _section("private names in another file of their room", [str(found) for found in house.private_within()])
    functions = [function for file in house.files for function in file.functions]
    file, function = max(house.files, key=lambda f: f.lines), max(functions, key=lambda f: f.lines)
    yield ""
    yield f"largest file      {file.module}: {file.lines} lines"
    yield f"largest function  {function.where}: {function.lines} lines"
    middle = median(f.lines for f in house.files if f.lines), median(f.lines for f in functions)
    yield f"medians           {middle[0]:g} lines a file that is not empty, {middle[1]:g} lines a function"
    bounds = f"over {FILE_LINES} lines, functions over {FUNCTION_LINES} lines or {PARAMETERS} parameters"
    yield from _section(f"large without a reason, beside kernels ({bounds})", list(house.large()))


def _kinds(kinds: Counter[str]) -> str:
    later = [f"{count} {when}" for when, count in sorted(kinds.items()) if when]
    return f" ({kinds[''] or 'none'} at the top, {', '.join(later)})" if later else f" ({kinds['']})"


def _section(title: str, lines: list[str]) -> Iterator[str]:
    yield ""
    yield f"{title}: {len(lines)}"
    yield from (f"  {line}" for line in lines)


def main() -> None:
    here = Path(__file__).resolve().parent.parent / "quantkit"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=here, help="the folder of the package (default: %(default)s)")
    print("\n".join(describe(House(parser.parse_args().root.resolve()))))


if __name__ == "__main__":
    main()
