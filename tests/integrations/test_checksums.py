"""Folders of ``save_pretrained`` have no hashes: damage is found by the checksums of what was loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import assert_same, gpt2, llama, quantized, tokens
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import CheckpointError
from quantkit.layers.attention import AttentionQuantizer

pytestmark = pytest.mark.usefixtures("found_once")
FILE = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    quantkit.register_with_transformers()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    quantized(llama(), "smoothquant", scheme="w8a8-static").save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


def flipped(tensor: torch.Tensor, bit: int) -> torch.Tensor:
    new = tensor.clone().contiguous()
    octets = new.view(-1).view(torch.uint8)
    octets[bit // 8 % len(octets)] ^= 1 << bit % 8
    return new


def test_a_bit_of_every_tensor(saved: Path, tmp_path: Path) -> None:
    """What an attack found: of 200 single flipped bits, 61 changed the output in silence."""
    whole = tensors_of(saved)
    for turn, name in enumerate(whole):
        folder = Path(shutil.copytree(saved, tmp_path / str(turn)))
        save_file(whole | {name: flipped(whole[name], 7919 * turn + turn)}, folder / FILE, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"does not hold what it held|damaged") as caught:
            transformers.LlamaForCausalLM.from_pretrained(folder)
        assert name.rpartition(".")[0] in str(caught.value)
        shutil.rmtree(folder)


def test_files_of_two_saves(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "mixed"))
    torch.manual_seed(1)
    quantized(llama(), "smoothquant", scheme="w8a8-static").save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / FILE, folder / FILE)
    with pytest.raises(CheckpointError, match="the files are damaged, or of two saves"):
        transformers.LlamaForCausalLM.from_pretrained(folder)


def test_what_a_user_may_ask_for(saved: Path, tmp_path: Path) -> None:
    """Another dtype, a class without the head, a second save, a folder from before there were checksums."""
    model = transformers.LlamaForCausalLM.from_pretrained(saved)
    half = transformers.LlamaForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert half.model.norm.weight.dtype == torch.bfloat16
    assert transformers.AutoModel.from_pretrained(saved)(tokens()).last_hidden_state.isfinite().all()
    half.save_pretrained(tmp_path / "half")
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half").state_dict(), half.state_dict())
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "changed")
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "changed").state_dict(), model.state_dict())
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"].pop("checksums")
    older = Path(shutil.copytree(saved, tmp_path / "older"))
    (older / "config.json").write_text(json.dumps(config))
    transformers.LlamaForCausalLM.from_pretrained(older)
    for nonsense in ({"model.norm": 3}, {"model.norm": {"float32": None}}, {"elsewhere": {}}, {}):
        config["quantization_config"]["checksums"] = nonsense
        (older / "config.json").write_text(json.dumps(config))
        transformers.LlamaForCausalLM.from_pretrained(older)


def test_tied_heads_and_conv1d(tmp_path: Path) -> None:
    model = quantized(gpt2(), "llm_int8")
    model.save_pretrained(tmp_path / "out")
    assert_same(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("buffer", "value"),
    [("key_label", 99), ("value_label", -1), ("key_range", float("nan")), ("value_range", float("inf"))],
    ids=str,
)
def test_values_of_rounded_attention(buffer: str, value: float, tmp_path: Path) -> None:
    """Labels beyond the clusters would be read out of bounds on a GPU."""
    model: Any = quantized(llama(), quantkit.RPTQ(), scheme="w4a8-static-kv4")
    name, quantizer = next((n, m) for n, m in model.named_modules() if isinstance(m, AttentionQuantizer))
    good = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bad = good | {f"{name}.{buffer}": good[f"{name}.{buffer}"].clone()}
    bad[f"{name}.{buffer}"].view(-1)[0] = value
    with pytest.raises(RuntimeError, match=rf"{buffer} (names a cluster|holds no finite)"):
        model.load_state_dict(bad)
    assert_same(model.state_dict(), good)
    getattr(quantizer, buffer).view(-1)[0] = value
    folder = quantkit.save(model, tmp_path / "own")
    with pytest.raises(CheckpointError, match=f"{name}.*{buffer}"):
        quantkit.load(folder)
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=f"{name}.*{buffer}"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "theirs")
