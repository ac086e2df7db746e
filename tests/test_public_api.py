"""What users may rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import quantkit


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
    assert len(errors) == 10
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
    """Without other libraries, and without the compiler of torch, which takes longer to import than all the rest."""
    heavy = ("transformers", "accelerate", "typer", "rich", "matplotlib", "gguf", "torchao", "tqdm.auto", "triton")
    heavy += ("torch._dynamo", "torch._inductor")
    code = f"import sys, quantkit; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
