"""The writer of safetensors files: byte for byte what the package of that name writes, one tensor at a time."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit import CheckpointError
from quantkit.checkpoint.tensors import TYPES, Entry, read_headers, unshared, write_shards


def entries_of(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry.of(name, tensor) for name, tensor in tensors.items()]


shapes = st.lists(st.integers(0, 3), max_size=3)
states = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(list(TYPES)), shapes),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=states)
def test_the_bytes_of_safetensors(state: dict[str, tuple[torch.dtype, list[int]]], tmp_path: Path) -> None:
    tensors = {name: torch.arange(torch.Size(shape).numel()).view(shape).to(dtype) for name, (dtype, shape) in state.items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert write_shards(entries_of(tensors), tmp_path, 2**30, alone="ours") == {"ours": list(tensors)}
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_of_any_layout(tmp_path: Path) -> None:
    table = torch.arange(12.0).view(3, 4)
    write_shards(entries_of({"t": table.t(), "row": table[1], "column": table[:, 1]}), tmp_path, 2**30, alone="x.safetensors")
    held = load_file(tmp_path / "x.safetensors")
    assert torch.equal(held["t"], table.t())
    assert torch.equal(held["row"], table[1])
    assert torch.equal(held["column"], table[:, 1])


def test_shards(tmp_path: Path) -> None:
    written = write_shards(
        entries_of({name: torch.ones(n) for name, n in zip("abcd", (1, 2, 9, 1), strict=True)}), tmp_path, 16
    )
    assert list(written.values()) == [["a", "b"], ["c"], ["d"]]  # what is too large has a file of its own
    assert list(written) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {name: found.shape for name, found in read_headers(tmp_path, written).items()} == {
        "a": (1,),
        "b": (2,),
        "c": (9,),
        "d": (1,),
    }
    with pytest.raises(CheckpointError, match="stored twice"):
        read_headers(tmp_path, [*written, *written])


def test_one_at_a_time(tmp_path: Path) -> None:
    """No tensor is made before its turn, and what nobody else holds is gone before the next."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = torch.ones(4)
        alive.append(weakref.ref(tensor))
        return tensor

    entries = [Entry(name, torch.float32, (4,), make) for name in "abc"]
    write_shards(entries, tmp_path, 2**30)
    assert len(alive) == 3
    assert not entries


def test_numbers_that_files_do_not_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'x' is torch\.complex128"):
        write_shards(entries_of({"x": torch.ones(1, dtype=torch.complex128)}), tmp_path, 2**30)


def test_names_of_one_tensor() -> None:
    x, empty = torch.ones(2, 3), torch.ones(0)
    tensors, tied = unshared({"a": x, "b": x, "c": x.view(3, 2), "d": empty, "e": empty})
    assert list(tensors) == ["a", "c", "d", "e"]
    assert tied == {"b": "a"}
