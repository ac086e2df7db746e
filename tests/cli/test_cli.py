"""The command line on a tiny saved Llama: what it prints, writes, and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import quantkit
from quantkit.cli.app import app

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]
TEXT = " ".join(WORDS[3 + i * i % (VOCAB - 3)] for i in range(200))
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model with its tokenizer, and a text."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    llama().save_pretrained(root / "float")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(root / "float")
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture(scope="module")
def int8(folder: Path) -> Path:
    out = folder / "int8"
    result = invoke("quantize", folder / "float", "-o", out, "-c", folder / "text.txt", "--ignore", "*.down_proj", "--quiet")
    assert "12 of 15 linears in INT8" in " ".join(result.stdout.split())
    return out


def invoke(*arguments: Any, code: int = 0) -> Result:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def shell(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from quantkit.cli.app import run; run()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("command", ["quantize", "export", "eval", "inspect", "demo"])
def test_help(command: str) -> None:
    assert "--quiet" in invoke(command, "--help", code=0).output
    assert command in invoke("--help").output


def test_version() -> None:
    assert invoke("--version").stdout.strip() == quantkit.__version__


def test_quantize(folder: Path, int8: Path) -> None:
    """The same model as through the library."""
    from quantkit.integrations.transformers.models import load_float

    model, tokenizer = load_float(str(folder / "float"))
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])[None]
    assert ids.shape == (1, 200)
    quantkit.quantize(model, calibration=[ids], ignore=["*.down_proj"], progress=False)
    again = quantkit.load(int8)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert (int8 / "tokenizer.json").is_file()


def test_quantize_options(folder: Path, tmp_path: Path) -> None:
    options = [
        "-m",
        "smoothquant",
        "-m",
        "rtn",
        "--scheme",
        "w8a8-asym",
        "--targets",
        "q_proj",
        "--dtype",
        "bfloat16",
        "--seed",
        3,
    ]
    invoke("quantize", folder / "float", "-o", tmp_path / "out", *options, "-c", folder / "text.txt", "-q")
    model = quantkit.load(tmp_path / "out")
    record = quantkit.report(model)
    assert (record.method, record.scheme, record.seed) == (["smoothquant", "rtn"], "w8a8-asym", 3)
    assert sum(layer.kind == "int8" for layer in record.layers) == 2
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_export(folder: Path, int8: Path) -> None:
    out = folder / "exported"
    assert "exported to" in invoke("export", int8, "-o", out).stdout
    assert (out / "tokenizer.json").is_file()
    again = json.loads(invoke("inspect", out, "--json").stdout)
    assert sum(layer["kind"] == "int8" for layer in again["layers"]) == 12
    common = ["--text", folder / "text.txt", "--windows", 1, "--length", 32, "-q", "--json"]
    native, exported = (json.loads(invoke("eval", model, *common).stdout) for model in (int8, out))
    assert exported["perplexity"] == pytest.approx(native["perplexity"], rel=0.01)
    done = shell("export", folder / "float", "-o", folder / "never")
    assert (done.returncode, (folder / "never").exists()) == (1, False)


def test_eval(folder: Path, int8: Path) -> None:
    common = ["--text", folder / "text.txt", "--windows", 2, "--length", 32, "-q"]
    result = json.loads(invoke("eval", int8, *common, "--reference", folder / "float", "--json").stdout)
    assert result["quantkit"] == quantkit.__version__
    assert result["tokens"] == 64
    assert 0 <= result["kl"] < 0.01
    assert 0.9 <= result["top1"] <= 1
    assert result["perplexity"] == pytest.approx(result["reference_perplexity"], rel=0.01)
    itself = json.loads(invoke("eval", folder / "float", *common, "--reference", folder / "float", "--json").stdout)
    assert (itself["kl"], itself["top1"], itself["nll_difference"]) == (0, 1, 0)
    assert itself["perplexity"] == result["reference_perplexity"]
    table = invoke("eval", int8, *common).stdout
    assert "perplexity" in table
    assert "kl" not in table


def test_inspect(folder: Path, int8: Path) -> None:
    assert "model.layers.0.self_attn.q_proj" in invoke("inspect", int8).stdout
    record = json.loads(invoke("inspect", int8, "--json").stdout)
    assert {layer["name"]: layer["reason"] for layer in record["layers"]}["model.layers.1.mlp.down_proj"] == "ignored"
    assert "8 sites" in invoke("inspect", folder / "float").stdout
    found = json.loads(invoke("inspect", folder / "float", "--json").stdout)
    assert len(found["sites"]) == 8
    assert found["float"] == {"lm_head": "output head"}
    assert found["sites"][0]["producer"] == "model.layers.0.input_layernorm"


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize"],
        ["nonsense"],
        ["eval", "x"],
        ["inspect", "x", "--nonsense"],
        ["eval", "x", "-t", "y", "--windows", "0"],
        ["tune"],
        ["tune", "--shape", "8x8", "--tokens", "0"],
    ],
    ids=" ".join,
)
def test_misuse(arguments: list[str]) -> None:
    invoke(*arguments, code=2)


def test_tune_without_a_gpu() -> None:
    refused = shell("tune", "--shape", "64x64")
    assert refused.returncode == 1
    assert "cannot tune for cuda" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_exit_codes(folder: Path, int8: Path) -> None:
    """One line on stderr and nothing on stdout: 1 for what quantkit refuses, 2 for misuse."""
    refused = shell("quantize", folder / "float", "-o", folder / "no", "-c", folder / "text.txt", "-q", "--scheme", "w9a9")
    assert refused.returncode == 1
    assert "error:" in refused.stderr
    assert "bits=9" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not refused.stdout
    assert not (folder / "no").exists()
    short = shell("eval", int8, "-t", folder / "text.txt", "--length", 999)
    assert short.returncode == 1
    assert "200 tokens" in " ".join(short.stderr.split())
    assert shell("eval", int8).returncode == 2


def test_recipe(folder: Path, tmp_path: Path) -> None:
    """A file, and then the checkpoint that it made, give the same bits."""
    (tmp_path / "r.yaml").write_text(
        "method: [smoothquant, {name: gptq, damping: 0.02}]\nscheme: w4a8\nignore: ['*.down_proj']\n"
    )
    common = [folder / "float", "-c", folder / "text.txt", "-q"]
    invoke("quantize", *common, "-o", tmp_path / "one", "--recipe", tmp_path / "r.yaml")
    invoke("quantize", *common, "-o", tmp_path / "two", "--recipe", tmp_path / "one")
    one, two = quantkit.load(tmp_path / "one"), quantkit.load(tmp_path / "two")
    assert quantkit.report(one).method == ["smoothquant", "gptq"]
    for key, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[key], value), key
    for extra in (["--scheme", "w8a8"], ["-m", "rtn"], ["--seed", 0], ["--ignore", "x"], ["--targets", "x"]):
        refused = invoke("quantize", *common, "-o", tmp_path / "no", "--recipe", tmp_path / "r.yaml", *extra, code=2)
        assert "--recipe says it all" in " ".join(refused.output.split())
    invoke("quantize", *common, "-o", tmp_path / "no", "--import-calibrators", code=2)
