"""The short forms of all attacks, each in a process of its own; ``make attack`` runs the long ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attack import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_breaks(kind: str, tmp_path: Path) -> None:
    program, output = Path(__file__).with_name("attack.py"), tmp_path / "found.json"
    command = [sys.executable, str(program), "--short", "--only", kind, "--seed", "1", "--output", str(output)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    (row,) = json.loads(output.read_text())["rows"]
    assert row["cases"] == KINDS[kind].short
    assert not row["wrong"]
