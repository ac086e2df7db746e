"""Small files that would stop a server, fetch code, or write to a terminal: refused after bounded work, or shown as text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import llama, quantized

import quantkit
from quantkit import CheckpointError, MethodError, Recipe
from quantkit.checkpoint.record import digest_of
from quantkit.core.text import LONGEST, printable, read_text
from quantkit.integrations.transformers.files import SPARE, at_most

pytestmark = pytest.mark.usefixtures("found_once")
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x7f\r"
"""Sets a title, clears the screen, turns the reading direction, returns to the start of the line."""
SHOWN = r"\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x7f\r"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantkit.save(quantized(llama(), "rtn"), tmp_path_factory.mktemp("saved") / "llama")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file, and make all hashes anew as an attacker would."""
    file, record = folder / name, folder / "quantkit.json"
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))
    whole = json.loads(record.read_text())
    if name != record.name:
        raw = file.read_bytes()
        whole["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    whole.pop("digest")
    record.write_text(json.dumps({**whole, "digest": digest_of(whole)}))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**5}, "num_hidden_layers 100000, and .* tensors are stored"),
    "more layers than anybody has": ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000"),
    "fewer, and still too many": ({"num_hidden_layers": 9_000}, "many more tensors than the"),
    "layers of text": ({"num_hidden_layers": "x" * 10**6}, "cannot be made"),
    "kernels": ({"attn_implementation": "evil/kernels"}, "attn_implementation 'evil/kernels', which is code of a hub"),
    "kernels, written otherwise": ({"_attn_implementation": "evil/kernels@main:f"}, "code of a hub"),
    "kernels of parts": ({"_attn_implementation": {"text_config": "evil/kernels"}}, "code of a hub"),
    "kernels in a part": ({"text_config": {"attn_implementation": "evil/kernels"}}, "code of a hub"),
    "kernels of experts": ({"experts_implementation": "evil/kernels"}, "code of a hub"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused_at_once(case: str, folder: Path) -> None:
    change, match = CONFIGS[case]
    edit(folder, "config.json", lambda body: body.update(change))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=match):
        quantkit.load(folder)
    assert time.monotonic() - start < 5


def test_buffers_that_nobody_stored(folder: Path, tmp_path: Path) -> None:
    """They get memory when the model is made: 8 TB here."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    bert = quantkit.save(quantized(BertModel(BertConfig(**sizes)).eval(), "rtn"), tmp_path / "bert")
    edit(bert, "config.json", lambda body: body.update(max_position_embeddings=10**12))
    with pytest.raises(CheckpointError, match=r"asks for buffers of \d+\.\d GiB"):
        quantkit.load(bert)


def test_counting_ends_with_its_block() -> None:
    from torch import nn

    with at_most(0):
        nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="many more tensors"), at_most(0):  # noqa: PT012
        for _ in range(SPARE + 1):
            nn.Linear(2, 2, bias=False)
    assert nn.Module.register_parameter.__module__ == nn.Module.__module__
    [nn.Linear(2, 2, bias=False) for _ in range(SPARE + 1)]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "quantkit.json"])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_files_that_are_none(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text(json.dumps({"password": "hunter2"}))
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "link":
        (folder / name).symlink_to(tmp_path / "secret.json")
    else:
        (folder / name).mkdir()
    with pytest.raises(CheckpointError) as caught:
        quantkit.load(folder)
    assert "hunter2" not in str(caught.value)


# ---- recipes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nmethod: *b\n", "has an alias"),
        ("method: " + "[" * 5000, "has lists in lists in lists"),
        ("method: [" + "a, " * 2**20 + "]", "is larger than 1 MiB"),
        ("method: !!python/object/apply:os.system [id]", "is no YAML"),
        (f"method: {'x' * 10**5}", r"characters\) \.\.\. .* is not known"),
    ],
    ids=["aliases", "deep", "large", "code", "long name"],
)
def test_recipes_that_are_refused(text: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(MethodError, match=match) as caught:
        Recipe.read(file)
    assert len(str(caught.value)) < 2 * LONGEST
    assert time.monotonic() - start < 5


def test_recipes_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(MethodError, match="is no plain file"):
        Recipe.read(tmp_path / "recipe.yaml")
    (tmp_path / "latin.json").write_bytes(b'{"method": "\xe9"}')
    with pytest.raises(MethodError, match="no text in UTF-8"):
        Recipe.read(tmp_path / "latin.json")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing", 1, MethodError)


# ---- terminals


def test_what_is_printable() -> None:
    for text in ("plain", "two\nlines", "Grüße 你好", ""):
        assert printable(text) == text
    assert printable(ESCAPES) == SHOWN
    assert printable("\ud800") == "\\ud800"


def test_records_do_not_write_to_a_terminal(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names, reasons, notes, and what is logged of a record."""

    def change(body: dict[str, Any]) -> None:
        body["report"]["calibration"] = body["report"]["layers"][0]["reason"] = ESCAPES
        body["check"] = {"why_not": ESCAPES}

    edit(folder, "quantkit.json", change)
    with caplog.at_level(logging.INFO, logger="quantkit"):
        found = quantkit.report(quantkit.load(folder))
    for text in (str(found), found.summary, caplog.text):
        assert SHOWN in text
        assert "\x1b" not in text
    edit(folder, "quantkit.json", lambda body: body["layers"].update({ESCAPES: next(iter(body["layers"].values()))}))
    with pytest.raises(CheckpointError) as caught:
        quantkit.load(folder)
    assert "owned" in str(caught.value)
    assert "\x1b" not in str(caught.value)
