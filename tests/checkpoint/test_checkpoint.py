"""save() and load(): the same bits come back, and nothing else ever comes out than a model or a CheckpointError."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import MLP, assert_same, gpt2, llama, mlp, normal, outputs, state, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import quantkit
from quantkit import CheckpointError, ModelError, Plan, Rotation, SmoothQuant, Stage, Transform
from quantkit.calibrators import methods
from quantkit.checkpoint import files, record, save
from quantkit.core.facts import OPTIONAL

pytestmark = pytest.mark.usefixtures("found_once")

SHARD = "model-00001-of-00001.safetensors"


def quantized(model: nn.Module, method: Any = "rtn", **options: Any) -> Any:
    data = [tokens()] if hasattr(model, "config") else [normal(2, 9, 16)]
    return quantkit.quantize(model, method, calibration=data, progress=False, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of an MLP; tests copy it."""
    torch.manual_seed(0)
    return quantkit.save(quantized(mlp(), SmoothQuant(0.5)), tmp_path_factory.mktemp("saved") / "mlp")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# ---- the same comes back


def falcon() -> Any:
    """Linears of a class of their own, which can only be tried when they have weights."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()


BUILDS = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2, "falcon": falcon}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_transformers_models(build: Callable[[], Any], tmp_path: Path) -> None:
    model = quantized(build(), "smoothquant")
    model.generation_config.max_new_tokens = 7
    again = quantkit.load(quantkit.save(model, tmp_path / "out"))
    assert type(again) is type(model)
    assert not again.training
    assert_same(outputs(again), outputs(model))
    assert_same(again.state_dict(), model.state_dict())
    assert again.generation_config.max_new_tokens == 7
    tied = model.config.tie_word_embeddings
    assert (again.get_input_embeddings().weight.data_ptr() == again.get_output_embeddings().weight.data_ptr()) == tied
    assert quantkit.report(again) == quantkit.report(model)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym", "w4a6-pertensor"])
def test_schemes(scheme: str, tmp_path: Path) -> None:
    model = quantized(mlp(), "smoothquant", scheme=scheme)
    fresh = mlp()
    assert quantkit.load(quantkit.save(model, tmp_path / "out"), model=fresh) is fresh
    assert fresh.up.scheme.name == scheme
    assert_same(fresh.state_dict(), model.state_dict())
    assert_same(outputs(fresh), outputs(model))


@pytest.mark.parametrize("method", methods())
def test_methods(method: str, tmp_path: Path) -> None:
    model = quantized(llama(), method)
    again = quantkit.load(quantkit.save(model, tmp_path / "out"))
    assert_same(again.state_dict(), model.state_dict())
    assert_same(outputs(again), outputs(model))


EVERYTHING = {
    "shift": normal(16), "scale": normal(16).exp(), "permutation": torch.arange(15, -1, -1), "outliers": torch.tensor([3, 5]),
    "rotation": Rotation(8, torch.tensor([1.0, -1.0] * 8)),
}  # fmt: skip


class Leave:
    """Plans one transform for the site of ``up``; what cannot be folded is left to run time."""

    name, stage, statistics = "leave", Stage.SCALE, ()

    def __init__(self, *steps: str) -> None:
        self.transform = Transform(**{step: EVERYTHING[step] for step in steps})

    def plan(self, view: Any) -> Plan:
        return Plan({"up": self.transform})


@pytest.mark.parametrize("steps", [*[(s,) for s in EVERYTHING], tuple(EVERYTHING)], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_leftovers(steps: tuple[str, ...], dtype: torch.dtype, bias: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = mlp()
        model.up = nn.Linear(16, 24, bias=bias)
        return model

    model = build().to(dtype)
    quantkit.quantize(model, Leave(*steps), calibration=[normal(2, 9, 16).to(dtype)], progress=False)
    again = quantkit.load(quantkit.save(model, tmp_path / "out"), model=build())
    into_the_norm = [("scale",), ("shift",)] if bias else [("scale",)]
    assert again.up.rewrites_input == (steps not in into_the_norm)
    assert_same(again.state_dict(), model.state_dict())
    x = normal(2, 3, 16).to(dtype)
    assert_same(outputs(again, x), outputs(model, x))


class Shared(nn.Module):
    """Modules that are registered at several places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), nn.Module()
        self.inner.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.again = self.inner.head
        self.first = self.second = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.again(self.norm(self.first(self.inner.head(self.norm(x))))))


def test_modules_with_several_names(tmp_path: Path) -> None:
    x = normal(8, 16)
    model = quantkit.quantize(Shared(), calibration=[x], progress=False)
    assert model.second is model.first
    assert isinstance(model.second, quantkit.W8A8Linear)
    again = quantkit.load(quantkit.save(model, tmp_path / "x"), model=Shared())
    assert again.again is again.inner.head
    assert again.second is again.first
    assert_same(again(x), model(x))


def test_half_precision(tmp_path: Path) -> None:
    model = quantized(llama().bfloat16(), "smoothquant")
    again = quantkit.load(quantkit.save(model, tmp_path / "out"))
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert_same(outputs(again), outputs(model))


def test_buffers_of_a_model_that_was_cast(tmp_path: Path) -> None:
    """Rotary frequencies come back as they were: rounded where the whole model was cast, else in float32."""
    half = llama()
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    for model, dtype in ((half, torch.float32), (llama().bfloat16(), torch.bfloat16)):
        folder = quantkit.save(quantized(model, "rtn"), tmp_path / str(dtype))
        again = quantkit.load(folder)
        assert again.model.rotary_emb.inv_freq.dtype == model.model.rotary_emb.inv_freq.dtype == dtype
        assert_same(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("cast", "says"), [({"nowhere": "bfloat16"}, "nowhere"), ({"x": "int8"}, "'cast'"), ([], "'cast'")])
def test_a_record_of_buffers_that_is_wrong(tmp_path: Path, cast: Any, says: str) -> None:
    folder = quantkit.save(quantized(llama(), "rtn"), tmp_path / "out")
    file = folder / record.RECORD_FILE
    body = json.loads(file.read_text()) | {"cast": cast}
    body.pop("digest")
    file.write_text(json.dumps(body | {"digest": record.digest_of(body)}))
    with pytest.raises(CheckpointError, match=says):
        quantkit.load(folder)


def test_a_float_model_after_smoothing(tmp_path: Path) -> None:
    model = quantized(llama(), SmoothQuant(0.5), scheme=None)
    assert_same(outputs(quantkit.load(quantkit.save(model, tmp_path / "out"))), outputs(model))


def test_the_calibration_data_is_known(tmp_path: Path) -> None:
    """By a hash over its tensors in order, which comes back with the report."""
    first, second = normal(2, 9, 16), normal(2, 9, 16, seed=1)

    def digest(*data: Any, method: str = "smoothquant") -> str | None:
        model = quantkit.quantize(mlp(), method, calibration=list(data) or None, progress=False)
        again = quantkit.load(quantkit.save(model, tmp_path / "out"), model=mlp())
        assert quantkit.report(again) == quantkit.report(model)
        return quantkit.report(model).calibration_sha256

    wanted = hashlib.sha256()
    for batch in (first, second):
        wanted.update(b"torch.float32 [2, 9, 16]" + bytes(batch.view(torch.uint8).flatten().tolist()))
    assert digest(first, second) == wanted.hexdigest() != digest(second, first)
    assert digest((first,)) == digest(first)


def test_shards(saved: Path, tmp_path: Path) -> None:
    model = quantkit.load(saved, model=mlp())
    out = quantkit.save(model, tmp_path / "out", shard_bytes=300)
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [[t.nbytes for t in load_file(f).values()] for f in files]
    assert all(len(s) == 1 or sum(s) <= 300 for s in sizes)
    assert_same(quantkit.load(out, model=mlp()).state_dict(), model.state_dict())


def test_saving_is_deterministic(saved: Path, tmp_path: Path) -> None:
    again = quantkit.save(quantkit.load(saved, model=mlp()), tmp_path / "again")
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in saved.iterdir()}


# ---- writing is all or nothing


def test_only_quantized_models_and_own_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not quantized"):
        quantkit.save(mlp(), tmp_path / "out")
    model, foreign, file = quantized(mlp()), tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    file.write_text("a file")
    for target in (foreign, file):
        with pytest.raises(CheckpointError, match=f"{target.name} exists"):
            quantkit.save(model, target)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "foreign"]
    (tmp_path / "empty").mkdir()
    quantkit.load(quantkit.save(model, tmp_path / "empty"), model=mlp())
    quantkit.load(quantkit.save(model, tmp_path / "a" / "b"), model=mlp())


@pytest.mark.parametrize("where", ["write_shards", "sha256_of"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_the_old_checkpoint(
    where: str, error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(save, where, fail)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
            quantkit.save(quantized(mlp()), target)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_replacing_a_checkpoint(folder: Path) -> None:
    model = quantized(mlp(), scheme="w4a4")
    (folder / "stale.safetensors").write_text("of the old one")
    quantkit.save(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == [SHARD, "quantkit-check.safetensors", "quantkit.json"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert_same(quantkit.load(folder, model=mlp()).state_dict(), model.state_dict())


# ---- reading refuses


@contextmanager
def refused(*words: str, model: nn.Module | None = None) -> Iterator[nn.Module]:
    """The load inside raises CheckpointError with these words and leaves the model alone."""
    model = mlp() if model is None else model
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        yield model
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_same(state(model), before)


def sign(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda body: None) -> None:
    """Rewrite the record with hashes, sizes and digest as an attacker would."""
    file = folder / "quantkit.json"
    body = json.loads(file.read_text())
    for name, facts in body["files"].items():
        raw = (folder / name).read_bytes()
        facts.update(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw))
    new = change(body)
    body = body if new is None else new
    if isinstance(body, dict):
        body.pop("digest", None)
        body["digest"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(body))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / SHARD)
    sign(folder)


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with refused(path.name, "no quantkit checkpoint") as model:
            quantkit.load(path, model=model)


def test_damage(folder: Path) -> None:
    raw, record = (folder / SHARD).read_bytes(), (folder / "quantkit.json").read_text()
    for damaged, words in ((raw[:-1], "truncated"), (b"", "truncated"), (bytes([*raw[:-1], raw[-1] ^ 1]), "SHA-256")):
        (folder / SHARD).write_bytes(damaged)
        with refused(SHARD, words) as model:
            quantkit.load(folder, model=model)
        if len(damaged) < len(raw):
            sign(folder)  # the hash agrees, the content is still cut
            with refused(SHARD) as model:
                quantkit.load(folder, model=model)
            (folder / "quantkit.json").write_text(record)
    (folder / SHARD).unlink()
    with refused(SHARD, "missing") as model:
        quantkit.load(folder, model=model)
    (folder / SHARD).write_bytes(raw)
    quantkit.load(folder, model=mlp())
    (folder / "quantkit.json").write_text(record.replace('"w8a8"', '"w4a4"', 1))
    with refused("digest") as model:
        quantkit.load(folder, model=model)


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    return put(*path)


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set ``path[:-2]`` at key ``path[-2]`` to ``path[-1]``; a path of names alone deletes."""

    def change(body: Any) -> None:
        *keys, last = path if all(isinstance(p, str) for p in path) and path[-1] not in VALUES else path[:-1]
        for key in keys:
            body = body[key]
        if (*keys, last) == path:
            del body[last]
        else:
            body[last] = path[-1]

    return change


VALUES = ("wrong", "w9a8", "../x", "BertModel")
STRANGER = {"in_features": 1, "out_features": 1, "scheme": "w8a8", "bias": True, "rotation_block": 0}
STRANGER |= {"threshold": 0.0, "outliers": 0, "buffers": [], "groups": []}
RECORDS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "another format": (put("format", "wrong"), ["not written by quantkit"]),
    "newer": (put("format_version", 7), ["version 7", "upgrade"]),
    "older": (put("format_version", 1), ["version 1", "quantize the model again"]),
    "no version": (drop("format_version"), ["version None"]),
    "a list": (lambda body: [body], ["not written by quantkit"]),
    "a number": (lambda body: 3, ["not written by quantkit"]),
    "no files": (drop("files"), ["files"]),
    "files are a list": (put("files", [SHARD]), ["files"]),
    "a file without facts": (put("files", SHARD, None), ["files"]),
    "a file without bytes": (drop("files", SHARD, "bytes"), ["files"]),
    "empty files": (put("files", {}), ["missing"]),
    "no layers": (drop("layers"), ["layers"]),
    "layer of another type": (put("layers", "up", 3), ["layers"]),
    "layer without scheme": (drop("layers", "up", "scheme"), ["layers"]),
    "unknown scheme": (put("layers", "up", "scheme", "w9a8"), ["'up'", "w9a8", "bits=9"]),
    "unknown layer": (put("layers", "top", STRANGER), ["'top'"]),
    "other sizes": (put("layers", "up", "in_features", 17), ["'up'", "17"]),
    "negative sizes": (put("layers", "up", "in_features", -16), ["'up'"]),
    "huge sizes": (put("layers", "up", "in_features", 10**30), ["'up'"]),
    "strange rotation": (put("layers", "up", "rotation_block", 3), ["'up'", "3"]),
    "negative rotation": (put("layers", "up", "rotation_block", -2), ["'up'"]),
    "no bias": (put("layers", "up", "bias", False), ["'up.bias'"]),
    "fewer layers": (drop("layers", "up"), ["up.weight"]),
    "tied to nothing": (put("tied", {"norm.weight": "wrong"}), ["'norm.weight'", "missing"]),
    "tied to a number": (put("tied", {"norm.weight": 3}), ["tied"]),
    "surplus name": (put("tied", {"wrong": "norm.weight"}), ["'wrong'", "no place"]),
    "no report": (drop("report"), ["report"]),
    "report of another type": (put("report", []), ["report"]),
    "report without layers": (drop("report", "layers"), ["report"]),
    "report with a stranger": (put("report", "wrong", 3), ["report"]),
    "report of other layers": (put("report", "layers", [3]), ["report"]),
    "class of another type": (put("transformers_class", 3), ["transformers_class"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_hostile_records(case: str, folder: Path) -> None:
    change, words = RECORDS[case]
    sign(folder, change)
    with refused(*words) as model:
        quantkit.load(folder, model=model)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"format": "quantkit", "a": ' + "[" * 900 + "]" * 900 + "}", "null", "\ud800", "1" * 5000],
    ids=lambda t: t[:5] or "empty",
)
def test_records_that_are_no_json(text: str, folder: Path) -> None:
    (folder / "quantkit.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with refused(folder.name) as model:
        quantkit.load(folder, model=model)


def test_a_record_of_unreasonable_size(folder: Path) -> None:
    with (folder / "quantkit.json").open("ab") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with refused("larger than") as model:
        quantkit.load(folder, model=model)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b/c.safetensors", "x" * 5000, "a\0b", "\ud800"],
    ids=lambda name: ascii(name[:20]),
)
def test_names_that_leave_the_folder(name: str, folder: Path) -> None:
    shutil.copy(folder / SHARD, folder.parent / "x.safetensors")

    def change(body: dict[str, Any]) -> None:
        body["files"][name] = body["files"].pop(SHARD)

    sign(folder, change)
    with refused("outside the checkpoint") as model:
        quantkit.load(folder, model=model)


def test_links(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / SHARD).rename(outside)
    (folder / SHARD).symlink_to(outside)
    with refused(SHARD, "link that leaves") as model:
        quantkit.load(folder, model=model)
    hub = folder.parent / "hub"  # the layout of huggingface_hub
    (hub / "snapshots").mkdir(parents=True)
    (hub / "blobs").mkdir()
    folder.rename(hub / "snapshots" / "abc")
    (hub / "snapshots" / "abc" / SHARD).unlink()
    outside.rename(hub / "blobs" / "123")
    (hub / "snapshots" / "abc" / SHARD).symlink_to(Path("../../blobs/123"))
    quantkit.load(hub / "snapshots" / "abc", model=mlp())


TENSORS: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "missing": (lambda t: t.pop("up.weight_scale"), ["'up.weight_scale'", "missing"]),
    "surplus": (lambda t: t.update(extra=torch.ones(1)), ["'extra'", "no place"]),
    "wrong shape": (lambda t: t.update({"norm.weight": torch.ones(17)}), ["'norm.weight'", "[17]", "[16]"]),
    "wrong shape of a leftover": (lambda t: t.update({"up.pre_scale": torch.ones(3)}), ["'up.pre_scale'", "[3]", "[16]"]),
    "half an outlier": (lambda t: t.update({"up.outlier_index": torch.tensor([1])}), ["'up'", "outlier"]),
    "float codes": (lambda t: t.update({"up.weight": torch.ones(24, 16)}), ["'up.weight'", "torch.float32"]),
    "short scales": (lambda t: t.update({"up.weight_scale": torch.ones(24, 1).half()}), ["'up.weight_scale'", "torch.float16"]),
    "short leftover": (lambda t: t.update({"up.pre_scale": torch.ones(16).bfloat16()}), ["'up.pre_scale'", "torch.bfloat16"]),
    "integer norm": (lambda t: t.update({"norm.weight": torch.ones(16).int()}), ["'norm.weight'", "torch.int32"]),
    "float permutation": (lambda t: t.update({"up.permutation": torch.ones(16)}), ["'up.permutation'", "torch.float32"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_tensors(case: str, folder: Path) -> None:
    change, words = TENSORS[case]
    rewrite(folder, change)

    def listed(body: dict[str, Any]) -> None:
        """The record lies with the tensors."""
        held = load_file(folder / SHARD)
        body["layers"]["up"]["buffers"] = [b for b in OPTIONAL if f"up.{b}" in held]
        body["layers"]["up"]["outliers"] = len(held.get("up.outlier_index", ()))

    sign(folder, listed)
    with refused(*words) as model:
        quantkit.load(folder, model=model)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [("buffers", ["weight"], "'weight'"), ("buffers", ["wrong"], "'wrong'"), ("buffers", 3, "layers"),
     ("outliers", -1, "'up'"), ("outliers", 10**9, "outliers"), ("threshold", -1.0, "threshold"),
     ("threshold", float("nan"), "threshold"), ("threshold", 6, "layers"),
     ("buffers", [["shift"]], "'up'")],
)  # fmt: skip
def test_hostile_facts_of_a_layer(key: str, value: Any, word: str, folder: Path) -> None:
    sign(folder, put("layers", "up", key, value))
    with refused(word) as model:
        quantkit.load(folder, model=model)


@pytest.mark.parametrize("scheme", ["w8a8-asym", "w8a8-static"])
def test_a_threshold_where_none_can_be(scheme: str, folder: Path) -> None:
    """Zero points and static scales would be applied to columns that have left the product."""
    sign(folder, lambda body: body["layers"]["up"].update(threshold=6.0, scheme=scheme))
    with refused("'up'", "symmetric scales per token") as model:
        quantkit.load(folder, model=model)


def test_other_models(folder: Path, tmp_path: Path) -> None:
    for other in (mlp(width=8), mlp(inner=8), nn.Sequential(nn.Linear(4, 4)), llama()):
        with refused(model=other) as model:
            quantkit.load(folder, model=model)
    with pytest.raises(CheckpointError, match="model=MyModel"):
        quantkit.load(folder)
    with pytest.raises(ModelError, match="quantized already"):
        quantkit.load(folder, model=quantized(mlp()))


def test_foreign_transformers_classes(tmp_path: Path) -> None:
    out = quantkit.save(quantized(llama()), tmp_path / "out")
    for name in ("wrong", "AutoModel", "LlamaConfig", "BertModel", "__name__", "GPT2LMHeadModel"):
        copied = Path(shutil.copytree(out, tmp_path / name))
        sign(copied, lambda body, name=name: body.update(transformers_class=name))
        with pytest.raises(CheckpointError):
            quantkit.load(copied)
    for text in ("", "[]", "{}", '{"hidden_size": "a"}', '{"num_hidden_layers": -1}'):
        (out / "config.json").write_text(text)
        sign(out)
        with pytest.raises(CheckpointError):
            quantkit.load(out)
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        quantkit.load(out)


# ---- fuzzing behind the digest

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.sampled_from(["w8a8", "up", "norm.weight", SHARD])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6
)
fuzz = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def paths(value: Any, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*so_far, key)
        yield from paths(value[key], (*so_far, key))


def opens_or_refuses(folder: Path) -> None:
    model = mlp()
    before = state(model)
    try:
        quantkit.load(folder, model=model)
    except CheckpointError as error:
        if "verify=False" not in str(error):  # what it says is known no sooner than when it is filled
            assert_same(state(model), before)
    else:
        outputs(model)


@fuzz
@given(data=st.data())
def test_fuzzed_records(folder: Path, saved: Path, data: st.DataObject) -> None:
    shutil.copy(saved / "quantkit.json", folder)

    def change(body: Any) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            *path, last = data.draw(st.sampled_from(sorted(paths(body), key=str)))
            parent = body
            for key in path:
                parent = parent[key]
            if data.draw(st.booleans()):
                parent[last] = data.draw(values)
            elif isinstance(parent, dict) and data.draw(st.booleans()):
                parent[data.draw(st.text(max_size=6))] = parent.pop(last)
            else:
                del parent[last]

    sign(folder, change)
    opens_or_refuses(folder)


@fuzz
@given(data=st.data())
def test_fuzzed_tensors(folder: Path, saved: Path, data: st.DataObject) -> None:
    """Bytes of the safetensors header, its length, or its fields, with a record that vouches for them."""
    raw = (saved / SHARD).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, body = raw[8 : 8 + size], raw[8 + size :]
    if data.draw(st.booleans()):
        fields = json.loads(header)
        *path, last = data.draw(st.sampled_from(sorted(paths(fields), key=str)))
        parent = fields
        for key in path:
            parent = parent[key]
        parent[last] = data.draw(
            values | st.sampled_from(["F64", "F16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U64", 1, 16, 24, -1, 2**63])
        )
        header = json.dumps(fields).encode()
        raw = struct.pack("<Q", len(header)) + header + body
    else:
        spot, byte = data.draw(st.integers(0, 7 + size)), data.draw(st.integers(0, 255))
        raw = raw[:spot] + bytes([byte]) + raw[spot + 1 :]
    (folder / SHARD).write_bytes(raw)
    shutil.copy(saved / "quantkit.json", folder)
    sign(folder)
    opens_or_refuses(folder)


def test_loading_reads_no_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr("pickle.load", never)
    monkeypatch.setattr("pickle.loads", never)
    assert isinstance(quantkit.load(folder, model=copy.copy(mlp())), MLP)
