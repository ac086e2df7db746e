"""Checkpoints of every format that was ever readable open, hold the same tensors, and compute the same bits.

tests/fixtures/make_checkpoints.py wrote them, with the versions of quantkit that had these formats.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import BACKENDS, FOLDER, expected, facts_of, known, layers_of, opened
from digests import digest, foreign
from pinned import run

import quantkit

KNOWN = known()
RECORD = json.loads(Path(__file__).with_name("record.json").read_text(encoding="utf-8"))


def test_every_folder_is_known() -> None:
    assert {folder.name for folder in FOLDER.iterdir() if folder.is_dir()} == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_the_same_tensors_and_outputs_of_layers(name: str) -> None:
    model, wanted = opened(name, KNOWN[name]), expected(name)
    assert facts_of(model) == KNOWN[name]["layers"]
    assert digest(model.state_dict().items()) == KNOWN[name]["state"]
    changed = []
    for backend in BACKENDS:
        with quantkit.use_backend(backend), torch.no_grad():
            for path, layer in layers_of(model).items():
                got = layer(wanted[f"in.{layer.in_features}"])
                if digest([(path, got)]) != digest([(path, wanted[f"out.{path}"])]):
                    changed.append(f"{path} on the backend {backend!r}")
    assert not changed, "\n".join(["these layers compute other bits:", *changed])


def test_the_same_outputs_of_models(tmp_path: Path) -> None:
    """In the pinned environment, since attention and norms compute with floats."""
    got, _ = run("checkpoints.py", Path(quantkit.__file__).parent, tmp_path / "outputs.json")
    wanted = {name: digest([("output", expected(name)["output"])]) for name in KNOWN}
    lines = [
        f"the output of {name} has other bits: {where} gives {found}"
        for name, outputs in got["outputs"].items()
        for where, found in outputs.items()
        if found != wanted[name]
    ]
    assert got["outputs"].keys() == wanted.keys()
    if lines:
        pytest.fail("\n".join(foreign(RECORD["arithmetic"], got["arithmetic"]) + lines), pytrace=False)
