"""The command line on a tiny saved Llama: what it prints, writes, and exits with."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from helpers import TEXT, VOCAB, write_llama
from typer.testing import CliRunner, Result

import quantkit
from quantkit import calibrators
from quantkit.cli import demo
from quantkit.cli.app import app, run

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model with its tokenizer, and a text."""
    root = tmp_path_factory.mktemp("cli")
    write_llama(root / "float")
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


def shell(*arguments: Any, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'quantkit'; from quantkit.cli.app import run; run()",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | (env or {}))


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


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The entry point with arguments: exit code, standard output, standard error."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(logging.getLogger("quantkit"), "level", logging.WARNING)

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        monkeypatch.setattr("quantkit.cli.app._places", [])
        capsys.readouterr()
        try:
            run()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
HEADS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "reward": (lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**TINY, vocab_size=VOCAB, num_labels=1)), "score"),
    "embedding": (lambda: T.LlamaModel(T.LlamaConfig(**TINY, vocab_size=VOCAB)), None),
    "classifier": (lambda: T.BertForSequenceClassification(T.BertConfig(**TINY, vocab_size=VOCAB)), "classifier"),
    "encoder-decoder": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        "lm_head",
    ),
}  # fmt: skip


def saved(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = HEADS[name][0]()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", HEADS)
def test_the_class_that_a_folder_names_is_made(name: str, folder: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    model, head = saved(name, tmp_path / "float"), HEADS[name][1]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "float" / file, tmp_path / "float")
    options = ["-c", folder / "text.txt", "-m", "rtn", "-o", tmp_path / "int8"]
    assert command("quantize", tmp_path / "float", *options)[::2] == (0, "")
    again = quantkit.load(tmp_path / "int8")
    assert type(again) is type(model)
    if head is not None:
        assert torch.equal(again.get_submodule(head).weight, model.get_submodule(head).weight)
    code, out, _ = command("inspect", tmp_path / "float", "--json")
    assert (code, bool(json.loads(out)["sites"])) == (0, True)
    code, _, error = command("eval", tmp_path / "float", "-t", folder / "text.txt")
    assert (code, error.count("\n")) == (1, 1)
    assert "no causal language model" in error


@pytest.mark.parametrize(
    ("architectures", "words"),
    [
        (["LlamaForSequenceClassification"], ["1 missing", "score.weight"]),
        (["LlamaModel"], ["1 unexpected", "lm_head.weight"]),
        (["SomebodysOwnLlama"], ["no model class 'SomebodysOwnLlama'"]),
        (["PreTrainedTokenizerFast"], ["no model class"]),
        (None, ["names 0 classes"]),
        (["LlamaModel", "LlamaForCausalLM"], ["names 2 classes"]),
    ],
    ids=str,
)
def test_files_of_another_class_are_refused(
    architectures: list[str] | None, words: list[str], folder: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(folder / "float", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"architectures": architectures}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    code, out, error = command("quantize", tmp_path / "other", "-o", tmp_path / "no", "-c", folder / "text.txt")
    assert (code, out, error.count("\n")) == (1, "", 1), error
    assert all(word in error for word in words), error
    assert not (tmp_path / "no").exists()


WRONG = {
    "method": (["-m", "smothquant"], ["did you mean 'smoothquant'?"]),
    "scheme": (["--scheme", "w8a8static"], ["did you mean 'w8a8-static'?"]),
    "no text": (["-c", "{root}/[nothing].txt"], ["/[nothing].txt"]),
    "no UTF-8": (["-c", "{root}/bytes"], ["bytes is no text"]),
    "output": (["-o", "{root}/float"], ["no quantkit checkpoint"]),
    "recipe": (["--recipe", "{root}/[nothing].yaml"], ["[nothing].yaml"]),
    "nothing else": ([], ["[missing] does not exist"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_are_refused_before_the_model_is_looked_at(case: str, folder: Path, command: Callable[..., Any]) -> None:
    """The model is missing, and that is said only where nothing else is wrong."""
    (folder / "bytes").write_bytes(b"\xff\xfe\xff")
    options = [option.format(root=folder) for option in WRONG[case][0]]
    code, out, error = command("quantize", folder / "[missing]", "-o", folder / "no", *options)
    assert (code, out, error.count("\n")) == (1, "", 1), error
    assert all(word in error for word in WRONG[case][1]), error


def test_models_that_are_none_in_floating_point(folder: Path, int8: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    quantkit.export(int8, tmp_path / "exported")
    quantkit.load(int8).save_pretrained(tmp_path / "pretrained")
    (tmp_path / "empty").mkdir()
    pictures = T.ViTConfig(**TINY, image_size=8, patch_size=4)
    T.ViTForImageClassification(pictures).save_pretrained(tmp_path / "pictures")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "[nonsense]"}')
    for place, words in {
        int8: "quantized already",
        tmp_path / "exported": "quantized already",
        tmp_path / "pretrained": "quantized already",
        folder / "float" / "config.json": "is a file",
        tmp_path / "empty": "has no config.json",
        tmp_path / "damaged": "transformers cannot open it",
        tmp_path / "pictures": "comes without a tokenizer",
    }.items():
        code, out, error = command("quantize", place, "-o", tmp_path / "no", "-c", folder / "text.txt")
        assert (code, out, error.count("\n")) == (1, "", 1), error
        assert words in error
    code, _, error = command("quantize", folder / "float", "-o", tmp_path / "no", "--device", "[cpu]")
    assert (code, error.count("\n")) == (1, 1)
    assert "--device [cpu]" in error


def test_without_transformers(command: Callable[..., Any], folder: Path, int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments in (["quantize", folder / "float", "-o", folder / "no"], ["inspect", folder / "float"], ["inspect", int8]):
        code, out, error = command(*arguments)
        assert (code, out, error.count("\n")) == (1, "", 1), error
        assert "pip install 'quantkit-w8a8[transformers]'" in error


def test_without_other_packages(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    for arguments, word in ((["inspect", "some.gguf"], "gguf"), (["demo", "-o", tmp_path / "no"], "'quantkit-w8a8[demo]'")):
        code, out, error = command(*arguments)
        assert (code, out, error.count("\n")) == (1, "", 1), error
        assert f"pip install {word}" in error
    assert not (tmp_path / "no").exists()


def test_speeds_of_the_demo_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models take turns, and the first round does not count."""
    a, b = [(99.0, 0.0, 0.0), (1.0, 3.0, 7.0), (9.0, 1.0, 5.0), (2.0, 2.0, 9.0)], [(9.0, 9.0, 9.0), *[(20.0, 10.0, 30.0)] * 3]
    said = iter([speeds for pair in zip(a, b, strict=True) for speeds in pair])
    asked = []
    monkeypatch.setattr(demo, "speed", lambda model, window: (asked.append(model), next(said))[1])
    found = demo.speeds({"a": "A", "b": "B"}, torch.zeros(4), rounds=3)
    assert asked == ["A", "B"] * 4
    assert found == {
        name: dict(zip(demo.SPEEDS, values, strict=True)) for name, values in (("a", (2, 2, 7)), ("b", (20, 10, 30)))
    }


def test_facts_as_json(folder: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    T.LlamaForCausalLM.from_pretrained(folder / "float", dtype=torch.bfloat16).save_pretrained(tmp_path / "16")
    options = ["-m", "rtn", "-c", folder / "text.txt", "--dtype", "auto", "--device", "cpu", "--json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "float" / name, tmp_path / "16")
    code, out, error = command("quantize", tmp_path / "16", "-o", tmp_path / "[int8]", *options)
    assert (code, error) == (0, "")
    facts = json.loads(out)
    model = quantkit.load(tmp_path / "[int8]")
    assert quantkit.Report.from_dict(facts["report"]) == quantkit.report(model)
    assert (facts["output"], model.lm_head.weight.dtype) == (str(tmp_path / "[int8]"), torch.bfloat16)
    code, out, _ = command("export", tmp_path / "[int8]", "-o", tmp_path / "[out]")
    assert "/[out]" in "".join(out.split())
    code, out, _ = command("export", tmp_path / "[int8]", "-o", tmp_path / "[out]", "--json")
    assert json.loads(out)["bytes"] == sum(file.stat().st_size for file in (tmp_path / "[out]").iterdir())


class Interrupting(quantkit.PerSite):
    """Ctrl-C while a model is looked at."""

    name, stage = "interrupting", quantkit.Stage.SCALE

    def plan_site(self, site: quantkit.SiteView) -> Any:
        raise KeyboardInterrupt


def test_ctrl_c_says_what_was_written(
    folder: Path, command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(calibrators._methods, "interrupting", Interrupting)
    common = ["quantize", folder / "float", "-c", folder / "text.txt", "-o", tmp_path / "out"]
    assert command(*common, "-m", "interrupting") == (130, "", "interrupted: nothing was written\n")
    assert not (tmp_path / "out").exists()

    def late(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.cli.app._bytes", late)
    code, _, error = command(*common, "-m", "rtn")
    assert (code, error.count("\n")) == (130, 1)
    assert str(tmp_path / "out" / "quantkit.json") in error
    assert error.endswith("written, and nothing else\n")


def test_values_are_completed_and_bars_need_a_terminal(folder: Path, tmp_path: Path) -> None:
    words = {"quantkit quantize x -m smo": "smoothquant", "quantkit quantize x --scheme w8a8-static-a": "w8a8-static-asym"}
    for line, wanted in words.items():
        env = {"_QUANTKIT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        assert shell(env=env).stdout.split() == [wanted]
    done = shell("quantize", folder / "float", "-c", folder / "text.txt", "-m", "rtn", "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "%|" not in done.stderr
