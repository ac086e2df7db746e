"""Which kernel runs which shape: the built-in tables, the file of ``quantkit tune``, and what is tuned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from quantkit.core.errors import BackendError
from quantkit.ops.gpu import devices, tune
from quantkit.ops.gpu.product import tiles, tuned
from quantkit.ops.gpu.product.door import choose
from quantkit.ops.gpu.product.tiles import Decode, Gemm, Tile, Vector


def test_the_table_knows_every_shape() -> None:
    for m in (1, 2, 16, 17, 64, 65, 128, 129, 1000, 100_000):
        for n in (1, 64, 4096, 57344):
            for arch in (0, 80, 86, 89, 90, 100, 120):
                assert isinstance(tiles.portable(arch, m, n), Tile)
            assert isinstance(tiles.hopper(m, n), Gemm | Decode)
            assert isinstance(choose(torch.device("cpu"), m, n, 4096, tma=True), Tile)


EVERY_KIND = {
    "64x32": {"1": Vector(8, 2, 4), "16": Decode(16, 10), "256": Gemm(128, 6, early=True), "512": Tile(16, 32, 64, 4, 4, 2)}
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a GPU here would look into."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU / 80 GB")
    tuned.tuned.cache_clear()
    yield tuned.cache_path(torch.device("cuda"))
    tuned.tuned.cache_clear()


def test_tuned_choices_come_back(table: Path) -> None:
    written = {shape: {m: tuned.as_json(c) for m, c in rows.items()} for shape, rows in EVERY_KIND.items()}
    table.write_text(json.dumps(written))
    device = torch.device("cuda")
    assert re.fullmatch(r"some-gpu-80-gb_triton-[\w.]+_quantkit-[\w.]+\.json", table.name)
    wanted = {1: "1", 2: "16", 16: "16", 17: "256", 256: "256", 300: "512"}
    for m, key in wanted.items():
        assert tuned.tuned_config(device, m, 64, 32) == EVERY_KIND["64x32"][key]
    assert tuned.tuned_config(device, 513, 64, 32) is None, "beyond what was measured, the built-in table decides"
    assert tuned.tuned_config(device, 1, 64, 48) is None


def test_few_tokens_never_take_the_kernel_tuned_for_many(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes 16-bit results only, and would be slow: with nothing but 256 tokens tuned, 10 follow the built-in table."""
    monkeypatch.setattr(devices, "capability", lambda device: 90)
    found = Gemm(128, 5, early=True)
    table.write_text(json.dumps({"64x32": {"256": tuned.as_json(found)}}))
    device = torch.device("cuda")
    assert choose(device, 256, 64, 32, tma=True) == found
    assert choose(device, 10, 64, 32, tma=True) == tiles.hopper(10, 64)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"4096": {}}', '{"1x2": {"a": {}}}', '{"1x2": {"1": {"kernel": "Evil"}}}',
                                     '{"1x2": {"1": {"kernel": "Tile", "m": 1}}}', '{"1x2": 3}'])  # fmt: skip
def test_a_damaged_table_counts_as_none(table: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    table.write_text(content)
    with caplog.at_level("WARNING", "quantkit"):
        assert tuned.tuned_config(torch.device("cuda"), 1, 1, 2) is None
        assert tuned.tuned_config(torch.device("cuda"), 1, 1, 2) is None
    assert len(caplog.records) == 1, "said once"
    assert str(table) in caplog.text
    assert "quantkit tune" in caplog.text


def test_an_unreadable_table_counts_as_none(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    table.mkdir()
    assert tuned.tuned(torch.device("cuda")) == {}
    assert str(table) in caplog.text


def test_a_table_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="--output"):
        tune._write(tmp_path / "file" / "table.json", {})


def test_a_table_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    tune._write(path, {"1x2": {"1": tuned.as_json(Vector(8, 1, 4))}})
    tune._write(path, {"1x2": {"1": tuned.as_json(Vector(4, 1, 4))}})
    assert tuned.parse(tune._read(path)) == {(1, 2): [(1, Vector(4, 1, 4))]}
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    assert tune._read(tmp_path / "none") == {}


def test_candidates_start_with_the_built_in_choice() -> None:
    device = torch.device("cpu")
    for m in tune.TOKENS:
        found = tune.candidates(device, m, 4096, 4096)
        assert found[0] == (tiles.vector(4096) if m == 1 else tiles.portable(0, m, 4096))
        assert len(found) == len(set(found)) > 3


@pytest.mark.parametrize(("shape", "message"), [("4096", "OUTPUTxINPUT"), ("axb", "OUTPUTxINPUT"), ("0x8", "no channels")])
def test_shapes_that_are_none(shape: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        list(tune.parse_shapes([shape]))


def test_tune_needs_a_gpu() -> None:
    for device in ("cpu", "cuda", "nonsense"):
        with pytest.raises(BackendError, match=device):
            tune.tune([(64, 64)], device=device)


def test_shapes_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2), torch.nn.Linear(4, 8))
    assert tune.shapes_of(model) == [(2, 8), (8, 4)]
