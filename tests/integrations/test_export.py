"""export(), and load() of the compressed-tensors layout: every byte as its readers expect it, and a clear no to the rest."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from helpers import assert_same, gpt2, llama, mlp, normal, outputs, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.quantizers import auto

import quantkit
from quantkit import CheckpointError, LLMInt8, ModelError, Plan, Rotation, Scheme, SmoothQuant, Stage, Transform, W8A8Linear
from quantkit.integrations.compressed.export import on_grid
from quantkit.integrations.compressed.layout import parse
from quantkit.model.modules import call, replace_module, tensors_in
from quantkit.ops.cpu.backend import has_integer_product

pytestmark = pytest.mark.usefixtures("found_once")

SCHEMES = ["w8a8", "w8a8-asym", "w8a8-static", "w8a8-static-asym"]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "llmcompressor"
MADE = ["dynamic", "dynamic-asym", "static", "static-asym", "pertensor"]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    transformers.utils.logging.disable_progress_bar()


def quantized(method: Any = "smoothquant", scheme: str = "w8a8", **sizes: Any) -> Any:
    return quantkit.quantize(llama(**sizes), method, calibration=[tokens()], scheme=scheme, progress=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return quantkit.export(quantized(), tmp_path_factory.mktemp("exported") / "out")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def config_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return result


# ---- every byte


INPUTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "w8a8": ({"symmetric": True, "strategy": "token", "dynamic": True}, []),
    "w8a8-asym": ({"symmetric": False, "strategy": "token", "dynamic": True}, []),
    "w8a8-static": ({"symmetric": True, "strategy": "tensor", "dynamic": False}, ["input_scale"]),
    "w8a8-static-asym": (
        {"symmetric": False, "strategy": "tensor", "dynamic": False}, ["input_scale", "input_zero_point"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_types_and_shapes(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(attention_bias=True).to(dtype)
    quantkit.quantize(model, calibration=[tokens()], scheme=scheme, progress=False)
    out = quantkit.export(model, tmp_path / "out")
    inputs, extra = INPUTS[scheme]
    assert {k: v for k, v in config_of(out).items() if k != "quantkit"} == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {"num_bits": 8, "type": "int", **inputs},
            }
        },
    }
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in llama(attention_bias=True).to(dtype).state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if not layer.endswith("_proj") or leaf != "weight":
            wanted[name] = (dtype, tuple(tensor.shape))
            continue
        wanted[name] = (torch.int8, tuple(tensor.shape))
        wanted[f"{layer}.weight_scale"] = (torch.float32, (tensor.shape[0], 1))
        for key in extra:
            wanted[f"{layer}.{key}"] = (torch.int8 if key.endswith("point") else torch.float32, (1,))
    stored = load_file(out / "model.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == wanted
    raw = (out / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}
    scales = [t for name, t in stored.items() if name.endswith("scale")]
    assert all(torch.equal(s.bfloat16().float(), s) for s in scales)
    if dtype == torch.float16:
        assert all(torch.equal(s.half().float(), s) for s in scales)
    for prefix, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        for key in extra:
            assert len({float(stored[f"model.layers.1.{prefix}.{n}_proj.{key}"]) for n in names}) == 1


@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_no_code_changes_with_the_nearest_bfloat16(scale: float) -> None:
    """127 * 2**-8 < 1/2: the stored code is the nearest one to the old weight on the new grid."""
    stored = on_grid(torch.tensor([scale]))
    codes = torch.arange(-127, 128, dtype=torch.float64)
    assert torch.equal(torch.round(codes * torch.tensor(scale, dtype=torch.float64) / stored.double()), codes)
    assert abs(float(stored) / scale - 1) <= 2**-8
    up = on_grid(torch.tensor([scale]), up=True)
    assert torch.equal(up.bfloat16().float(), up)
    assert scale <= float(up) <= scale * (1 + 2**-7)


def test_rows_too_small_for_float16_are_rounded_again(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_submodule(Q).weight[3] = torch.linspace(-1e-4, 1e-4, 32)
    quantkit.quantize(model.half(), "rtn", calibration=[tokens()], progress=False)
    before = model.get_submodule(Q).dequantized_weight()
    layer: Any = quantkit.load(quantkit.export(model, tmp_path / "out")).get_submodule(Q)
    assert float(layer.weight_scale[3]) == 2**-17
    assert int(layer.weight[3].abs().max()) == round(1e-4 * 2**17)
    assert float((layer.dequantized_weight() - before)[3].abs().max()) <= 2**-18 * 1.01
    assert torch.equal(layer.weight[:3], model.get_submodule(Q).weight[:3])


@pytest.mark.parametrize("scheme", [*SCHEMES, "w8a8-static-pertensor"])
def test_what_comes_back(scheme: str, tmp_path: Path) -> None:
    """Codes are equal, scales within half a step of bfloat16, all else the same bits."""
    model = quantized(scheme=scheme)
    again = quantkit.load(quantkit.export(model, tmp_path / "out"))
    assert type(again) is type(model)
    assert not again.training
    wanted, got = model.state_dict(), again.state_dict()
    assert list(wanted) == list(got)
    for name, tensor in wanted.items():
        if name.endswith("weight_scale"):
            torch.testing.assert_close(got[name], tensor, rtol=2**-8, atol=0)
        elif name.endswith("input_scale"):
            assert tensor <= got[name] <= tensor * (1 + 2**-7)
        else:
            assert_same({name: got[name]}, {name: tensor})
    assert [layer.name for layer in quantkit.report(again).layers] == [
        name for name, m in again.named_modules() if isinstance(m, W8A8Linear)
    ] + ["lm_head"]
    assert [(r.name, r.reason) for r in quantkit.report(again).others] == [("model.embed_tokens", "embedding")]
    native = quantkit.load(quantkit.save(again, tmp_path / "native"))
    assert_same(outputs(native), outputs(again))
    twice = quantkit.load(quantkit.export(again, tmp_path / "twice"))
    assert_same(twice.state_dict(), again.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_arithmetic_of_engines(scheme: str, tmp_path: Path) -> None:
    """y = s_a s_w (x_q w_q^T - zp rowsum(w_q)) + b, from the stored tensors alone."""
    model = llama(attention_bias=True)
    quantkit.quantize(model, calibration=[tokens()], scheme=scheme, progress=False)
    out = quantkit.export(model, tmp_path / "out")
    t = {k.removeprefix(f"{Q}."): v.double() for k, v in load_file(out / "model.safetensors").items() if k.startswith(Q)}
    x = normal(5, 32).double()
    got = quantkit.load(out).get_submodule(Q)(x.float()).double()
    if "static" not in scheme:  # whose range comes from the model
        assert_close(got, x @ ((t["weight"] * t["weight_scale"]).t()) + t["bias"], noise=0.05)
    assert_close(got, fake_quant(x, t, Scheme.parse(scheme)), noise=1e-5)


def fake_quant(x: Tensor, t: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Integer by integer, by the rules of quantkit/numerics.py: symmetric codes end at -127."""
    scale, zero = t.get("input_scale"), t.get("input_zero_point", x.new_zeros(1))
    if scale is None and scheme.input.number.symmetric:
        scale = x.abs().amax(-1, keepdim=True) / 127
    elif scale is None:
        least, most = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        scale = (most - least) / 255
        zero = torch.round(-128 - least / scale)
    q = (torch.round(x * (1 / scale)) + zero).clamp(-127 if scheme.input.number.symmetric else -128, 127)
    y = scale * t["weight_scale"].view(1, -1) * (q @ t["weight"].t() - zero * t["weight"].sum(1))
    return y if "bias" not in t else y + t["bias"]


def as_compressed_tensors(x: Tensor, t: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The same by the rules of that package: 127.5 steps to the largest magnitude of a token, and all codes down to -128."""
    scale, zero = t.get("input_scale"), t.get("input_zero_point", x.new_zeros(1))
    least, most = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    if scale is None and scheme.input.number.symmetric:
        scale = torch.maximum(-least, most) / 127.5
    elif scale is None:
        scale = (most - least) / 255
        zero = torch.round((-128 - least / scale).clamp(-128, 127))
    q = torch.round((x / scale + zero).clamp(-128, 127))
    y = ((q - zero) * scale) @ (t["weight"] * t["weight_scale"]).t()
    return y if "bias" not in t else y + t["bias"]


def assert_close(got: Tensor, wanted: Tensor, *, noise: float) -> None:
    assert float((got - wanted).norm() / wanted.norm()) < noise


# ---- what goes along


def test_shards_from_a_folder(tmp_path: Path) -> None:
    """A folder is exported as the model in memory is, tensor by tensor, with its tokenizer."""
    model = quantized()
    model.generation_config.max_new_tokens = 7
    saved = quantkit.save(model, tmp_path / "saved")
    (saved / "tokenizer.json").write_text("{}")
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    one = quantkit.export(model, tmp_path / "one")
    many = quantkit.export(saved, tmp_path / "many", shard_bytes=5000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(f.name for f in many.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    joined = {name: t for f in files for name, t in load_file(many / f).items()}
    assert {name: next(f for f in files if name in load_file(many / f)) for name in joined} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in joined.values())
    assert_same(dict(sorted(joined.items())), dict(sorted(load_file(one / "model.safetensors").items())))
    assert (many / "config.json").read_text() == (one / "config.json").read_text()
    assert (many / "chat_template.jinja").read_text() == "{{ messages }}"
    assert sorted(f.name for f in many.iterdir() if f.name not in files) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    again: Any = quantkit.load(many)
    assert again.generation_config.max_new_tokens == 7
    assert_same(outputs(again), outputs(quantkit.load(one)))


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    out = quantkit.export(quantized(tie_word_embeddings=True), tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert config_of(out)["ignore"] == ["lm_head"]
    again: Any = quantkit.load(out)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


MIXTURES = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.3.w2", "model.layers.1.block_sparse_moe.gate"),
    "qwen3-moe": ("model.layers.0.mlp.experts.3.down_proj", "model.layers.1.mlp.gate"),
    "gpt-oss": ("model.layers.0.mlp.experts.3.down_proj", "model.layers.1.mlp.router"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_have_the_names_of_their_family(name: str, tmp_path: Path) -> None:
    family, (expert, router) = families.FAMILIES[name], MIXTURES[name]
    model: Any = family.build().eval()
    quantkit.quantize(model, "rtn", calibration=[family.batch()], progress=False)
    out = quantkit.export(model, tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    n = families.WIDTH
    assert stored[f"{expert}.weight"].shape[0] == n
    assert stored[f"{expert}.weight"].dtype == torch.int8
    assert stored[f"{expert}.weight_scale"].shape == (n, 1)
    assert router in config_of(out)["ignore"]
    with torch.no_grad():
        wanted, got = (next(tensors_in(call(m, family.batch()))) for m in (model, quantkit.load(out)))
    assert_close(got, wanted, noise=0.3)  # one route that changes moves a token


@pytest.mark.parametrize("name", ["falcon", "llama4", "phi3", "gemma3", "t5", "clip", "jamba"])
def test_families(name: str, tmp_path: Path) -> None:
    family = families.FAMILIES[name]
    model: Any = family.build().eval()
    quantkit.quantize(model, "rtn", calibration=[family.batch()], progress=False)
    again = quantkit.load(quantkit.export(model, tmp_path / "out"))
    assert {n: m.weight.sum() for n, m in again.named_modules() if isinstance(m, W8A8Linear)} == {
        n: m.weight.sum() for n, m in model.named_modules() if isinstance(m, W8A8Linear)
    }


# ---- what is refused


class Leave:
    """Plans one transform for the first MLP; down_proj of llama folds, so what is left is asked of q, k and v."""

    name, stage, statistics = "leave", Stage.SCALE, ()

    def __init__(self, **steps: Any) -> None:
        self.transform = Transform(**steps)

    def plan(self, view: Any) -> Plan:
        return Plan({Q: self.transform})


SIGNS = torch.tensor([1.0, -1.0] * 16)
REWRITES = {
    "shift": Leave(shift=normal(32)),
    "permutation": Leave(permutation=torch.arange(31, -1, -1)),
    "rotation": Leave(rotation=Rotation(8, SIGNS)),
    "pre_scale": Leave(scale=normal(32).exp(), permutation=torch.arange(31, -1, -1)),
}


def refused(model: Any, tmp_path: Path, match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        quantkit.export(model, tmp_path / "deep" / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", REWRITES)
def test_rewrites_are_refused_or_undone(what: str, tmp_path: Path) -> None:
    model = llama()
    if what == "pre_scale":  # no norm to take it
        model.model.layers[0].input_layernorm.weight.data.zero_()
    quantkit.quantize(model, REWRITES[what], calibration=[tokens()], progress=False)
    layer = model.get_submodule(Q)
    refused(model, tmp_path, rf"'{Q}' cannot be exported.*{what}.*rewrites='undo'")
    again: Any = quantkit.load(quantkit.export(model, tmp_path / "out", rewrites="undo"))
    plain, x = layer.to_float(), normal(3, 32)
    assert not again.get_submodule(Q).rewrites_input
    assert_close(again.get_submodule(Q)(x), plain(x), noise=0.03)


@pytest.mark.parametrize(
    ("method", "match"),
    [(LLMInt8(columns=3), "3 outlier columns stay in 16 bit"), (LLMInt8(threshold=2.0), "columns that reach 2")],
    ids=["columns", "threshold"],
)
def test_outliers_are_refused_or_dropped(method: Any, match: str, tmp_path: Path) -> None:
    model = quantized(method)
    refused(model, tmp_path, rf"{match}.*outliers='drop'")
    again: Any = quantkit.load(quantkit.export(model, tmp_path / "out", outliers="drop"))
    x = normal(3, 32)
    assert_close(again.get_submodule(Q)(x), model.get_submodule(Q).to_float()(x), noise=0.03)


def test_other_refusals(tmp_path: Path) -> None:
    refused(quantized("rtn", "w4a8"), tmp_path, "w4a8 simulates other bits than 8")
    refused(quantkit.quantize(gpt2(), "rtn", calibration=[tokens()], progress=False), tmp_path, "Conv1D")
    refused(quantkit.quantize(mlp(), "rtn", calibration=[normal(2, 9, 16)], progress=False), tmp_path, "no transformers model")
    refused(quantized(SmoothQuant(0.5), None), tmp_path, "no INT8 layer")
    refused(llama(), tmp_path, "has not quantized")
    refused(quantized("rtn"), tmp_path, "format='gguf'", format="gguf")
    refused(quantized("rtn"), tmp_path, "outliers='keep'", outliers="keep")
    model = quantized("rtn", "w8a8-static")
    model.get_submodule(Q).input_scale *= 2
    refused(model, tmp_path, "read one tensor and differ in input_scale")
    model = quantized("rtn")
    layer = model.get_submodule(Q)
    replace_module(model, Q, W8A8Linear(layer.in_features, layer.out_features, bias=False, groups=(16, 16)))
    refused(model, tmp_path, "scales by group")


def test_a_static_scale_holds_for_one_input_only(tmp_path: Path) -> None:
    model = llama()
    quantkit.quantize(model, REWRITES["shift"], calibration=[tokens()], scheme="w8a8-static", progress=False)
    refused(model, tmp_path, "static scale holds for the rewritten input only", rewrites="undo")


def test_a_part_of_a_fused_layer_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = quantkit.quantize(llama(), "rtn", calibration=[tokens()], ignore=["*.1.self_attn.k_proj"], progress=False)
    quantkit.export(model, tmp_path / "out")
    assert "model.layers.1.self_attn.k_proj is in floating point" in caplog.text
    assert config_of(tmp_path / "out")["ignore"] == ["model.layers.1.self_attn.k_proj", "lm_head"]


class Broken:
    def save_pretrained(self, folder: Path) -> None:
        raise OSError("no space left")


def test_all_or_nothing(exported: Path, tmp_path: Path) -> None:
    model, out = quantized("rtn"), tmp_path / "out"
    with pytest.raises(CheckpointError, match="out cannot be written: no space"):
        quantkit.export(model, out, tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(exported, out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(CheckpointError, match="out cannot be written: no space"):
        quantkit.export(model, out, tokenizer=Broken())
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    quantkit.export(model, out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} != before
    saved = quantkit.save(model, tmp_path / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    shutil.copytree(FIXTURES / "dynamic", tmp_path / "foreign")
    for target in (saved, tmp_path / "mine", tmp_path / "foreign"):
        with pytest.raises(CheckpointError, match="exists and is no export"):
            quantkit.export(model, target)
    with pytest.raises(CheckpointError, match="no quantkit checkpoint"):
        quantkit.export(tmp_path / "mine", tmp_path / "new")


# ---- what others wrote


def computed_by(rule: Callable[..., Tensor], folder: Path, dtype: torch.dtype) -> Any:
    """The model of a folder in float32, its layers computed in ``dtype`` from what is stored."""
    model, stored = quantkit.load(folder), load_file(folder / "model.safetensors")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, W8A8Linear):
            parts = {k.removeprefix(f"{name}."): t.to(dtype) for k, t in stored.items() if k.startswith(f"{name}.")}
            replace_module(model, name, Computed(rule, parts, layer.scheme))
    return nn.Module.float(model)


class Computed(nn.Module):
    def __init__(self, rule: Callable[..., Tensor], parts: dict[str, Tensor], scheme: Scheme) -> None:
        super().__init__()
        self.rule, self.parts, self.scheme = rule, parts, scheme

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x.to(self.parts["weight"].dtype), self.parts, self.scheme).to(x.dtype)


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_checkpoints_of_llmcompressor(name: str) -> None:
    """Two references read the files alone: one equals what transformers said, the other, by quantkit's rules, equals load()."""
    said = load_file(FIXTURES / f"{name}-said.safetensors")
    ids = said["input_ids"]
    theirs = computed_by(as_compressed_tensors, FIXTURES / name, torch.float32)
    assert_close(theirs(ids).logits, said["logits"], noise=1e-5)
    model = quantkit.load(FIXTURES / name)
    layers = [m for m in model.modules() if isinstance(m, W8A8Linear)]
    assert len(layers) == 14
    assert any(int(m.weight.min()) == -128 for m in layers)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        got = nn.Module.float(model)(ids).logits
    products = {e.key: e.count for e in profile.key_averages()}
    if has_integer_product():  # without, float32 multiplies the codes
        assert products["aten::_int_mm"] == len(layers)
    else:
        assert products["aten::mm"] >= len(layers)
    ours = computed_by(fake_quant, FIXTURES / name, torch.float32)
    assert_close(got, ours(ids).logits, noise=1e-5)
    # The last gap is the rule alone: 127 steps to the largest magnitude of a token, or 127.5.
    assert_close(got, said["logits"], noise=1e-3 if name == "static-asym" else 0.05)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu"])
def test_stock_from_pretrained_inside_the_context(device_map: str | None, folder: Path) -> None:
    tables = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    with quantkit.compressed_tensors_as_int8():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert_same(outputs(model), outputs(quantkit.load(folder)))
    assert tables == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    model.save_pretrained(folder / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours")
    assert_same(outputs(again), outputs(model))
    with pytest.raises(RuntimeError), quantkit.compressed_tensors_as_int8():
        raise RuntimeError
    assert tables == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_transformers_without_the_package_takes_no_codes_for_weights(folder: Path) -> None:
    with pytest.raises(ImportError, match="compressed"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


# ---- what is damaged or hostile


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads((folder / "config.json").read_text())
    change(body)
    (folder / "config.json").write_text(json.dumps(body))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_group(key: str, value: Any, part: str = "input_activations") -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["quantization_config"]["config_groups"]["group_0"][part][key] = value

    return change


def at_top(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["quantization_config"].__setitem__(key, value)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "four bits": (in_group("num_bits", 4, "weights"), "num_bits 4"),
    "huge": (in_group("num_bits", 10**40), "num_bits"),
    "eight point nought": (in_group("num_bits", 8.0), "num_bits 8.0"),
    "true bits": (in_group("num_bits", True), "num_bits True"),
    "float": (in_group("type", "float", "weights"), "type 'float'"),
    "groups": (in_group("strategy", "group", "weights"), "strategy 'group'"),
    "group size": (in_group("group_size", 128, "weights"), "group_size 128"),
    "asymmetric weights": (in_group("symmetric", False, "weights"), "symmetric False"),
    "order": (in_group("actorder", "group", "weights"), "actorder 'group'"),
    "blocks": (in_group("block_structure", [128, 128], "weights"), "block_structure"),
    "dynamic tensor": (in_group("strategy", "tensor"), "strategy 'tensor' with dynamic True"),
    "local": (in_group("dynamic", "local"), "dynamic 'local'"),
    "no inputs": (lambda b: b["quantization_config"]["config_groups"]["group_0"].pop("input_activations"), "None"),
    "outputs": (lambda b: b["quantization_config"]["config_groups"]["group_0"].update(output_activations={}), "output_"),
    "packed": (at_top("format", "pack-quantized"), "pack-quantized"),
    "frozen": (at_top("quantization_status", "frozen"), "frozen"),
    "cache": (at_top("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
    "sparse": (at_top("sparsity_config", {"format": "sparse-24-bitmask"}), "sparsity_config"),
    "rotated": (at_top("transform_config", {"config_groups": {"u": {}}}), "transform_config"),
    "no groups": (at_top("config_groups", {}), "config_groups"),
    "groups as a list": (at_top("config_groups", [1]), "config_groups"),
    "ignore as a text": (at_top("ignore", "lm_head"), "ignore"),
    "nothing is left": (at_top("ignore", ["Linear"]), "a weight_scale, and quantization_config does not"),
    "head too": (at_top("ignore", []), "'lm_head.weight_scale' is missing|lm_head.weight' is F32"),
    "for ever": (at_top("ignore", ["re:(.|.|m|o)*[XY]"]), "too long to match"),
    "for ever in targets": (
        lambda b: b["quantization_config"]["config_groups"]["group_0"].update(targets=["re:(.|.|m|o)*[XY]"]),
        "too long to match",
    ),
    "a long one": (at_top("ignore", ["re:" + ".?" * 300]), "600 characters"),
    "hub kernels": (lambda b: b.update(attn_implementation="org/repo"), "attn_implementation 'org/repo'"),
    "hub kernels of a part": (lambda b: b.update(_experts_implementation={"text": "org/repo"}), "code of a hub"),
    "many layers": (lambda b: b.update(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "many more layers": (lambda b: b.update(num_hidden_layers=9_999), "many more tensors"),
    "no expression": (at_top("ignore", ["re:("]), "is none"),
    "class": (lambda b: b.update(architectures=["os.system"]), "no model class"),
    "no class": (lambda b: b.pop("architectures"), "architectures"),
    "code": (lambda b: b.update(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "elsewhere": (lambda b: b.update(transformers_weights="../../other.safetensors"), "transformers_weights"),
    "another size": (lambda b: b.update(hidden_size=64), "has shape"),
    "more layers": (lambda b: b.update(num_hidden_layers=3), "missing"),
    "absurd": (lambda b: b.update(hidden_size=-1), "cannot load"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_refused(name: str, folder: Path) -> None:
    change, match = CONFIGS[name]
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=match):
        quantkit.load(folder)


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no codes": (lambda t: t.pop(f"{Q}.weight"), "missing"),
    "no scale": (lambda t: t.pop(f"{Q}.weight_scale"), "missing"),
    "no norm": (lambda t: t.pop("model.norm.weight"), "missing"),
    "shape": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :16].contiguous()}), "should be I8"),
    "scale shape": (lambda t: t.update({f"{Q}.weight_scale": torch.ones(7, 1)}), "should be F32"),
    "norm shape": (lambda t: t.update({"model.norm.weight": torch.ones(7)}), "has shape"),
    "float codes": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), "F32"),
    "wide codes": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].int()}), "I32"),
    "integer scale": (lambda t: t.update({f"{Q}.weight_scale": torch.ones(32, 1, dtype=torch.int8)}), "I8"),
    "NaN scale": (lambda t: t[f"{Q}.weight_scale"].fill_(math.nan), "not finite"),
    "negative scale": (lambda t: t[f"{Q}.weight_scale"].neg_(), "negative"),
    "zero points": (lambda t: t.update({f"{Q}.weight_zero_point": torch.ones(32, 1, dtype=torch.int8)}), "zero points"),
    "an input scale": (lambda t: t.update({f"{Q}.input_scale": torch.ones(1)}), "no place for it"),
    "a bias": (lambda t: t.update({f"{Q}.bias": torch.ones(32)}), "has a bias"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_refused(name: str, folder: Path) -> None:
    change, match = TENSORS[name]
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=match):
        quantkit.load(folder)


def test_zero_points_that_are_zero_do_no_harm(folder: Path) -> None:
    wanted = outputs(quantkit.load(folder))
    edit_tensors(folder, lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(32, 1, dtype=torch.int8)}))
    assert_same(outputs(quantkit.load(folder)), wanted)


TEXTS = {
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "huge number": '{"quantization_config": ' + "9" * 10_000 + "}",
    "a list": "[]",
    "nothing": "",
    "no text": b"\xff\xfe\x00".decode("latin-1"),
}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("name", TEXTS)
def test_json_that_is_refused(name: str, file: str, folder: Path) -> None:
    (folder / file).write_text(TEXTS[name], encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"damaged|no text in UTF-8"):
        quantkit.load(folder)


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "../out/model.safetensors", "sub/model.safetensors", "", ".", "x\x00y", "pytorch_model.bin", 7]
)
def test_indices_that_are_refused(place: Any, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
    with pytest.raises(CheckpointError, match=r"outside|missing|weight_map|no safetensors"):
        quantkit.load(folder)


def test_indices_that_lie(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    index = folder / "model.safetensors.index.json"
    for places in (dict.fromkeys([*names, "more"], "model.safetensors"), dict.fromkeys(names[1:], "model.safetensors")):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(CheckpointError, match=r"missing from|not in the index"):
            quantkit.load(folder)


def test_links_that_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    os.replace(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        quantkit.load(folder)


def test_nothing_from_outside_goes_along(tmp_path: Path) -> None:
    saved = quantkit.save(quantized("rtn"), tmp_path / "saved")
    (tmp_path / "secret").write_text("{}")
    (saved / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        quantkit.export(saved, tmp_path / "out")


def test_the_links_of_the_hub_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "1234", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copyfile(file, blobs / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    assert_same(outputs(quantkit.load(snapshot)), outputs(quantkit.load(folder)))


def test_other_things_beside_the_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        quantkit.load(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="leave model= out"):
        quantkit.load(folder, model=llama())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        quantkit.load(folder)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_truncated(size: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"damaged|no text in UTF-8"):
        quantkit.load(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["re:.*", "Linear"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.data())
def test_any_quantization_config_is_understood_or_refused(data: st.DataObject) -> None:
    """Some keys of a sound one get any value, at any depth."""
    config: Any = json.loads((FIXTURES / "static-asym" / "config.json").read_text())["quantization_config"]
    for _ in range(data.draw(st.integers(1, 3))):
        place = config
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        place[key] = data.draw(JSON)
    try:
        meaning = parse(config)
    except CheckpointError:
        return
    layer = nn.Linear(2, 2)
    assert meaning.scheme_of(["model.q_proj"], layer) in (
        None,
        *(Scheme.parse(s) for s in [*SCHEMES, "w8a8-pertensor"]),
        *(scheme for _, scheme in meaning.groups),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(0, 2999), byte=st.integers(0, 255))
def test_any_byte_of_a_header(where: int, byte: int, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A changed byte is refused, or leaves a model of the same layers."""
    folder = tmp_path_factory.mktemp("fuzz") / "copy"
    shutil.copytree(exported, folder)
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[where] = byte
    (folder / "model.safetensors").write_bytes(raw)
    try:
        model = quantkit.load(folder)
    except CheckpointError:
        return
    assert sum(isinstance(m, W8A8Linear) for m in model.modules()) == 14
