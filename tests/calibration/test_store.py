"""Finished work in a folder: it comes back to the bit, whole or not at all, and never for another key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import assert_same, normal

from quantkit import MethodError
from quantkit.calibration.store import Fingerprint, Store, Work

TENSORS = {"a": normal(2, 3), "b.c": torch.arange(4), "none": torch.zeros(0, 5)}


def test_work_comes_back(tmp_path: Path) -> None:
    with Store(tmp_path / "made" / "for it") as store:
        pass
    assert store.read("0000", "key", TENSORS, ["x"]) is None
    store.write("0000", "key", Work(TENSORS, {"x": math.pi, "y": 1}))
    done = store.read("0000", "key", TENSORS, ["x", "y"])
    assert done is not None
    assert_same(dict(done.tensors), TENSORS)
    assert done.numbers == {"x": math.pi, "y": 1.0}
    assert [p.name for p in store.folder.iterdir()] == ["0000.safetensors"]


def test_other_work_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("0000", "key", Work(TENSORS, {"x": 1.0}))
    for key, wanted in (("other", TENSORS), ("key", TENSORS | {"a": normal(3, 2)}), ("key", {"a": TENSORS["a"]})):
        with pytest.raises(MethodError, match="another run"):
            store.read("0000", key, wanted, ["x"])
    with pytest.raises(MethodError, match="damaged"):
        store.read("0000", "key", TENSORS, ["y"])
    file = tmp_path / "0000.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(MethodError, match="damaged"):
        store.read("0000", "key", TENSORS, ["x"])


def test_every_flipped_bit_of_a_file_is_found(tmp_path: Path) -> None:
    store, file = Store(tmp_path), tmp_path / "0000.safetensors"
    store.write("0000", "key", Work(TENSORS, {"x": 1.0}))
    whole = file.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(MethodError, match=r"damaged|another run"):
            store.read("0000", "key", TENSORS, ["x"])


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "0001.new").write_text("half")
    with Store(tmp_path), pytest.raises(MethodError, match="is in use by another run: wait"), Store(tmp_path):
        pass
    with Store(tmp_path):
        assert list(tmp_path.iterdir()) == []  # what a killed run left
    (tmp_path / "file").write_text("")
    with pytest.raises(MethodError, match="cannot be used"), Store(tmp_path / "file"):
        pass


def test_fingerprints_see_every_part() -> None:
    def key(*parts: str | torch.Tensor | None, start: str = "") -> str:
        fingerprint = Fingerprint(start)
        fingerprint.add(*parts)
        return fingerprint.key

    x = normal(3, 4)
    assert key("a", x, None) == key("a", x.clone(), None)
    assert key(x.t()) == key(x.t().contiguous())
    keys = [key("a", x, None), key("a", x), key("b", x, None), key("a", x + 1, None), key("a", x, None, start="s"), key()]
    assert len(set(keys)) == len(keys)
    assert key(x.bfloat16(), torch.zeros(0)) == key(x.bfloat16())
