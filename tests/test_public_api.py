"""What users may rely on, and which room of the package may look into which."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit

ROOT = Path(quantkit.__file__).parent

ROOMS = [
    {"_version", "errors"},
    {"numerics", "scheme", "transform", "sites", "modules", "targets"},
    {"statistics", "report"},
    {"ops"},
    {"linear", "experts"},
    {"discovery", "data"},
    {"fold", "turn", "observe", "attention", "calibrators"},
    {"pipeline", "compressed", "checkpoint", "export", "evaluate", "recipe"},
    {"integrations"},
    {"__init__"},
    {"demo", "cli", "__main__"},
]
"""From the ground up. A room may look into its own and those before it, at run time."""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(file: Path) -> set[str]:
    """Rooms that a file imports at its top level, but for type checking."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {room(a.name) for a in node.names if a.name.split(".")[0] == "quantkit"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module == "quantkit":
                found |= {a.name for a in node.names}
            elif node.module and node.module.startswith("quantkit."):
                found.add(room(node.module))
    return found


FILES = {".".join(("quantkit", *p.relative_to(ROOT).with_suffix("").parts)): p for p in sorted(ROOT.rglob("*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_imports_flow_downwards(name: str) -> None:
    height = {r: i for i, rooms in enumerate(ROOMS) for r in rooms}
    own = room(name)
    assert own in height, f"give {own} a room"
    for other in imports(FILES[name]):
        assert height[other] <= height[own], f"{name} imports {other} from above"


def test_all_is_the_truth() -> None:
    public = {n for n, v in vars(quantkit).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert sorted(quantkit.__all__) == sorted(public | {"__version__"})
    assert len(set(quantkit.__all__)) == len(quantkit.__all__)


METHODS_EXPLAINED = (quantkit.Scheme, quantkit.Transform, quantkit.Report, quantkit.Recipe)


@pytest.mark.parametrize("name", ["QuantKitConfig", *(n for n in quantkit.__all__ if n != "__version__")])
def test_public_names_are_explained(name: str) -> None:
    thing = getattr(quantkit, name)
    assert inspect.getdoc(thing)
    assert not (thing.__doc__ or "").startswith(f"{name}("), "that is the signature that dataclasses write"
    for method, value in vars(thing).items() if isinstance(thing, type) else ():
        if inspect.isfunction(value) and not method.startswith("_") and thing in METHODS_EXPLAINED:
            assert inspect.getdoc(value), f"{name}.{method}"


def test_errors_are_one_family() -> None:
    errors = [v for v in vars(quantkit).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(errors) == 9
    assert all(issubclass(e, quantkit.QuantkitError) for e in errors)
    assert issubclass(quantkit.QuantkitError, ValueError)


def test_without_transformers() -> None:
    """Every public name is there, and the one that needs it says so."""
    code = """
import sys; sys.modules["transformers"] = None
from quantkit import *
import quantkit
try: quantkit.QuantKitConfig
except ImportError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quantkit-w8a8[transformers]" in done.stdout


def test_importing_is_light() -> None:
    heavy = ("transformers", "accelerate", "typer", "rich", "matplotlib", "gguf", "torchao")
    code = f"import sys, quantkit; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
