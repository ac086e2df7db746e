"""One float arithmetic for every machine, as far as a machine allows it.

PyTorch, MKL and oneDNN choose their kernels by the instructions that a processor has, and these add in different orders. The
environment in :data:`ENVIRONMENT` makes each of them take the kernels that every x86-64 processor can run, on one thread.
What it cannot pin is pinned by :func:`digests.exact_roots`, and :func:`digests.arithmetic` shows whether all that worked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",  # the kernels of MKL without instructions that came after SSE2
    "ATEN_CPU_CAPABILITY": "default",  # the same of PyTorch
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # and the least that oneDNN knows
    "HF_HUB_OFFLINE": "1",
}
UNWANTED = ("TRITON_INTERPRET",)
"""Of the environment of our tests: no program here runs a kernel of Triton."""


def pin() -> None:
    """Start this program again in :data:`ENVIRONMENT`, unless it runs there already: libraries read it when they are loaded."""
    if all(os.environ.get(name) == value for name, value in ENVIRONMENT.items()) and not os.environ.keys() & set(UNWANTED):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {name: value for name, value in (os.environ | ENVIRONMENT).items() if name not in UNWANTED}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def run(program: str, package: Path, out: Path, *arguments: str) -> tuple[Any, str]:
    """Run a program of this folder in an interpreter of its own.

    Args:
        program: its file name; it pins itself, see :func:`pin`.
        package: the folder of the quantkit that it shall import.
        out: the JSON file that it shall write.
        arguments: of the command line, besides.

    Returns:
        What is in that file, and what the program had to say.
    """
    path = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments, "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
    return json.loads(out.read_text(encoding="utf-8")), done.stderr
