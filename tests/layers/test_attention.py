"""Attention in fewer bits: what is rounded, where it is found, and that the rest of the library knows of it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import VOCAB, WIDTH, assert_same, gpt2, llama, mlp, normal, outputs, state, tokens
from torch import Tensor, nn

import quantkit
from quantkit import RPTQ, CalibrationError, CheckpointError, MethodError, ModelError, Scheme, W8A8Linear
from quantkit.checkpoint.record import digest_of
from quantkit.core.heads import HeadSizes
from quantkit.discovery.attention import find_attention
from quantkit.layers.attention import AttentionQuantizer, attach_attention, attention_quantizers, detach_attention
from quantkit.ops.attention import attention, round_heads

pytestmark = pytest.mark.usefixtures("found_once")

PAPER = "w4a4-static-asym-norm8-kv4-attention4"
DYNAMIC = "w8a8-kv4-attention4"


def opt() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=WIDTH, pad_token_id=0)
    return transformers.OPTForCausalLM(config).eval()


def bert() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).eval()


class Bare(nn.Module):
    """Attention without heads, or with, and the call in the outermost module."""

    def __init__(self, heads: int | None = 2, width: int = 12) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv, self.out = (
            heads,
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        if self.heads is not None:
            parts = [p.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for p in parts]
        y = F.scaled_dot_product_attention(*parts, is_causal=True)
        return x + self.out(y if self.heads is None else y.transpose(-2, -3).flatten(-2))


def data_of(model: nn.Module) -> Tensor:
    return normal(2, 9, model.norm.normalized_shape[0]) if isinstance(model, Bare) else tokens()


def quantized(model: Any, scheme: Any, method: Any = "rtn", **options: Any) -> Any:
    return quantkit.quantize(model, method, scheme=scheme, progress=False, **{"calibration": [data_of(model)], **options})


def error_of(model: nn.Module, original: nn.Module) -> float:
    x = data_of(original)
    wanted, got = outputs(original, x)[0], outputs(model, x)[0]
    return float((got - wanted).norm() / wanted.norm())


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2, "opt": opt, "bert": bert, "bare": Bare}
OWNERS = {
    "llama": {"model.layers.0.self_attn", "model.layers.1.self_attn"},
    "gpt2": {"transformer.h.0.attn"},
    "opt": {"model.decoder.layers.0.self_attn", "model.decoder.layers.1.self_attn"},
    "bert": {"encoder.layer.0.attention.self", "encoder.layer.1.attention.self"},
    "bare": {""},
}


# ---- the module


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", ["w8a8-kv8-attention8", "w8a8-static-asym-kv8-attention8"])
def test_what_is_not_finite_is_not_hidden(scheme: str, value: float) -> None:
    quantizer = AttentionQuantizer(Scheme.parse(scheme), HeadSizes(2, 2, 4, 4))
    for name, buffer in quantizer.named_buffers():
        assert name.endswith("_range")
        buffer.copy_(torch.tensor([-3.0, 3.0])[:, None, None].expand_as(buffer))
    q, k, v = (normal(1, 2, 5, 4, seed=i) for i in range(3))
    wanted = quantizer(q, k, v, is_causal=True)
    k[0, 1, 3, 2] = value
    got = quantizer(q, k, v, is_causal=True)
    assert_same(got[0, 0], wanted[0, 0])
    assert_same(got[0, 1, :3], wanted[0, 1, :3])
    assert got[0, 1, 3:].isnan().all()


def test_gradients_pass_straight_through() -> None:
    quantizer = AttentionQuantizer(Scheme.parse("w8a8-kv8-attention8"), HeadSizes(2, 2, 4, 4))
    parts = [normal(1, 2, 5, 4, seed=i).requires_grad_() for i in range(3)]
    quantizer(*parts, is_causal=True).square().sum().backward()
    got = [p.grad for p in parts]
    for p in parts:
        p.grad = None
    F.scaled_dot_product_attention(*parts, is_causal=True).square().sum().backward()
    for a, p in zip(got, parts, strict=True):
        assert a is not None
        assert p.grad is not None
        assert float((a - p.grad).norm() / p.grad.norm()) < 0.05
    blind = torch.tensor([False, True])[:, None].expand(2, 5)
    assert torch.autograd.grad(attention(parts[0][:, :, :2], *parts[1:], blind).sum(), parts[1])[0].isfinite().all()


# ---- models


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_call_is_found(build: Any, request: pytest.FixtureRequest) -> None:
    model = build()
    name = request.node.callspec.id
    found = find_attention(model, data_of(model))
    assert found.keys() == OWNERS[name]
    kinds = {"llama": HeadSizes(4, 2, 8, 8), "bare": HeadSizes(2, 2, 6, 6)}
    assert set(found.values()) == {kinds.get(name, HeadSizes(4, 4, 8, 8))}
    assert attention_quantizers(quantized(model, "w8a8-kv4")).keys() == OWNERS[name]


@pytest.mark.parametrize("method", ["rtn", RPTQ(8, tile=4)], ids=["rtn", "rptq"])
@pytest.mark.parametrize("suffix", ["", "-asym", "-static", "-static-asym"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_fewer_bits_are_worse(build: Any, suffix: str, method: Any) -> None:
    torch.manual_seed(0)
    model = build()
    for p in model.parameters():
        if p.dim() == 2 and not isinstance(model, Bare):
            p.data.mul_(6)  # at its initial weights attention looks everywhere alike
    names = [f"w8a8{suffix}", *(f"w8a8{suffix}-kv{b}-attention{b}" for b in (8, 4, 2))]
    errors = [error_of(quantized(copy.deepcopy(model), name, method), model) for name in names]
    assert errors[1] < 3 * errors[0] + 0.02
    assert errors[1] < errors[2] < errors[3]
    assert errors[2] > 1.5 * errors[1]


def test_without_bits_nothing_is_touched() -> None:
    model = quantized(llama(), "w8a8")
    assert not attention_quantizers(model)
    assert all("forward" not in vars(m) for m in model.modules())


def test_keys_and_values_alone() -> None:
    """Without attention bits torch's own function runs, on what was rounded; without bits of keys only queries change."""
    q, k, v = (normal(1, 2, 5, 8, seed=i) for i in range(3))
    quantizer = AttentionQuantizer(Scheme.parse("w8a8-kv3"), HeadSizes(2, 2, 8, 8))
    k3, v3 = (round_heads(t, None, None, 1, 3, True) for t in (k, v))
    assert_same(quantizer(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k3, v3, is_causal=True))
    quantizer = AttentionQuantizer(Scheme.parse("w8a8-attention3"), HeadSizes(2, 2, 8, 8))
    assert_same(quantizer(q, k, v), attention(round_heads(q, None, None, 1, 3, True), k, v))


@pytest.mark.parametrize("method", ["rtn", RPTQ(8, by="kmeans")], ids=["rtn", "rptq"])
@pytest.mark.parametrize("scheme", ["w8a8-kv4", DYNAMIC, "w4a16-static-asym-kv4"])
@pytest.mark.parametrize("build", [llama, gpt2, opt])
def test_generating_with_a_cache(build: Any, scheme: str, method: Any) -> None:
    model, prompt = quantized(build(), scheme, method), tokens(2, 5, seed=3)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with_cache, without = (model.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    assert_same(with_cache, without)


@pytest.mark.parametrize("scheme", [DYNAMIC, PAPER])
def test_grouped_queries_in_both_ways(scheme: str) -> None:
    """transformers hands over grouped keys without a mask, and repeats them with one."""
    model, ids = llama(), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # a mask of ones would be dropped
    plain = quantized(copy.deepcopy(model), scheme, RPTQ(8), calibration=[ids])
    masked = quantized(copy.deepcopy(model), scheme, RPTQ(8), calibration=[{"input_ids": ids, "attention_mask": mask}])
    quantizers = [attention_quantizers(m)["model.layers.0.self_attn"] for m in (plain, masked)]
    assert [q.heads for q in quantizers] == [HeadSizes(4, 2, 8, 8)] * 2
    alone = plain(ids[:1]).logits
    both = plain(ids, attention_mask=mask).logits[:1]
    assert torch.allclose(alone, both, atol=1e-5)


def test_static_ranges_are_those_of_the_converted_model() -> None:
    """A fold multiplies rows of v, so the ranges of the model that was passed in would be wrong."""
    model, x = Bare(heads=None, width=16), normal(3, 11, 16)
    model.out.weight.data[:, 3] *= 30
    quantizer = attention_quantizers(quantized(model, "w8a8-static-asym-kv4", "smoothquant", calibration=[x, x * 2]))[""]
    seen: list[Tensor] = []
    model.qkv.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    for batch in (x, x * 2):
        model(batch)
    _, k, v = torch.cat(seen).chunk(3, -1)
    for t, ends in ((k, quantizer.key_range), (v, quantizer.value_range)):
        assert_same(ends, torch.stack([t.amin().clamp_max(0), t.amax().clamp_min(0)])[:, None, None])
    assert not hasattr(quantizer, "query_range")
    assert not hasattr(quantizer, "key_label")


# ---- clusters


@pytest.mark.parametrize("by", ["kmeans", "tiles"])
def test_channels_of_a_head_that_are_alike_go_together(by: Any) -> None:
    low, high = -torch.ones(1, 8), torch.ones(1, 8)
    low[0, [1, 6]], high[0, [1, 6]] = -20, 20
    label = RPTQ(by=by, head_clusters=2).label_head(low, high, False, "a")
    assert label.tolist() == [1, 0, 1, 1, 1, 1, 0, 1]


def test_queries_and_keys_share_clusters() -> None:
    """Four ends are the coordinates of a channel, as in the paper."""
    low, high = -torch.ones(2, 6), torch.ones(2, 6)
    high[0, 2], high[1, 4] = 9, 9  # one sticks out in the keys, another one in the queries
    label = RPTQ(by="kmeans", head_clusters=3).label_head(low, high, False, "a")
    assert len({int(label[i]) for i in (0, 2, 4)}) == 3
    assert len(set(label[[0, 1, 3, 5]].tolist())) == 1


@pytest.mark.parametrize("by", ["kmeans", "tiles"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_heads_that_are_hard_to_cluster(by: Any, symmetric: bool) -> None:
    for low, high in (
        (torch.zeros(1, 7), torch.zeros(1, 7)),
        (-torch.ones(2, 7), torch.ones(2, 7)),
        (torch.zeros(1, 7), torch.tensor([[0.0, 0, 1, 2, 3, 4, 5]])),
        (-torch.rand(1, 1), torch.rand(1, 1)),
        (-torch.arange(5.0)[None], torch.arange(5.0)[None]),
    ):
        label = RPTQ(by=by).label_head(low, high, symmetric, "a")
        assert label.shape == low.shape[1:]
        assert sorted(set(label.tolist())) == list(range(int(label.max()) + 1))
        assert int(label.max()) < 4


def test_clusters_help_where_channels_differ() -> None:
    torch.manual_seed(0)
    model = Bare(width=64)
    model.qkv.weight.data[128:144] *= 20  # values, which the output projection takes back
    model.out.weight.data[:, :16] /= 20
    errors = {
        n: error_of(quantized(copy.deepcopy(model), "w8a16-static-asym-kv4", RPTQ(head_clusters=n)), model) for n in (1, 4)
    }
    assert errors[4] < 0.6 * errors[1]


def test_one_cluster_is_none() -> None:
    models = [quantized(Bare(), scheme, RPTQ(head_clusters=1)) for scheme in (DYNAMIC, PAPER)]
    quantizers = [attention_quantizers(model)[""] for model in models]
    assert [q.clusters for q in quantizers] == [1, 1]
    assert not any("label" in name for q in quantizers for name, _ in q.named_buffers())
    assert "clusters" not in quantkit.report(models[1]).summary


# ---- a module among modules


def test_copies_are_whole() -> None:
    model, ids = quantized(llama(), PAPER, "rptq"), tokens()
    wanted, twin = outputs(model, ids), copy.deepcopy(model)
    for quantizer in attention_quantizers(model).values():
        quantizer.key_range.zero_()
    assert_same(outputs(twin, ids), wanted)
    assert not torch.equal(outputs(model, ids)[0], wanted[0])


def test_scales_stay_float32() -> None:
    model = quantized(llama(), PAPER, "rptq").bfloat16()
    for quantizer in attention_quantizers(model).values():
        assert {b.dtype for b in quantizer.buffers()} == {torch.float32, torch.int64}
    assert outputs(model, tokens())[0].isfinite().all()
    state = model.state_dict()
    assert state["model.layers.0.self_attn.attention_quantizer.query_range"].shape == (2, 4, 4)
    assert state["model.layers.0.self_attn.attention_quantizer.value_label"].shape == (2, 8)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_mode_is_left_by_errors_too(error: type[BaseException]) -> None:
    model = quantized(Bare(), "w8a8-kv2")

    def fail(*args: Any) -> None:
        raise error

    handle = model.out.register_forward_hook(fail)
    with pytest.raises(error):
        model(data_of(model))
    q = normal(1, 2, 3, 6)
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.allclose(
        F.scaled_dot_product_attention(q, q, q), (q @ q.transpose(-1, -2) / math.sqrt(6)).softmax(-1) @ q, atol=1e-5
    )
    handle.remove()
    assert error_of(model, Bare()) > 0


class Nested(nn.Module):
    """Calls attention itself, before and after a module that does so with other heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = Bare(heads=3), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.inner(F.scaled_dot_product_attention(x, x, x))
        return F.scaled_dot_product_attention(x, x, x)


def test_the_innermost_module_owns_a_call() -> None:
    model, x = Nested(), normal(2, 5, 12)
    found = find_attention(model, x)
    assert found == {"": HeadSizes(1, 1, 12, 12), "inner": HeadSizes(3, 3, 4, 4)}
    calls: list[tuple[str, Any]] = []
    quantized(model, "w8a8-kv4", calibration=[x])
    for name, quantizer in attention_quantizers(model).items():
        quantizer.register_forward_pre_hook(lambda m, args, name=name: calls.append((name, args[0].shape)))
    model(x)
    assert calls == [("", x.shape), ("inner", (2, 3, 5, 4))] * 2 + [("", x.shape)]


def test_compiled() -> None:
    model, ids = quantized(llama(num_hidden_layers=1), DYNAMIC, "rptq"), tokens()
    wanted = outputs(model, ids)[0]
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.allclose(outputs(compiled, ids)[0], wanted, atol=1e-5)
    assert not torch.allclose(outputs(quantized(llama(num_hidden_layers=1), "w8a8"), ids)[0], wanted, atol=1e-5)


def test_other_sizes_than_those_calibrated() -> None:
    quantizer = AttentionQuantizer(Scheme.parse(DYNAMIC), HeadSizes(4, 2, 8, 8))
    with pytest.raises(ModelError, match="a query of 3 heads of 8"):
        quantizer(*[normal(1, 3, 5, 8)] * 3)
    with pytest.raises(ModelError, match="a key of 4 heads of 6"):
        quantizer(normal(1, 4, 5, 8), normal(1, 4, 5, 6), normal(1, 4, 5, 6))


# ---- norms, and 16 bits


def test_bits_of_what_norms_write() -> None:
    model = quantized(llama(), PAPER)
    names = {n.rpartition(".")[2]: m.scheme.name for n, m in model.named_modules() if isinstance(m, W8A8Linear)}
    behind = dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "w4a8-static-asym")
    assert names == behind | dict.fromkeys(["o_proj", "down_proj"], "w4a4-static-asym")
    said = {x.name.rpartition(".")[2]: x.notes.get("scheme") for x in quantkit.report(model).layers if x.kind == "int8"}
    assert said == behind | dict.fromkeys(["o_proj", "down_proj"])
    small = quantized(llama(), "w8a16-static-norm4")
    names = {n.rpartition(".")[2]: m.scheme.name for n, m in small.named_modules() if isinstance(m, W8A8Linear)}
    assert (names["q_proj"], names["o_proj"]) == ("w8a4-static", "w8a16")


def test_bits_of_norms_need_norms() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    before = state(model)
    with pytest.raises(ModelError, match="-norm in its name"):
        quantkit.quantize(model, "rtn", scheme="w4a4-norm8", calibration=[normal(4, 8)], progress=False)
    assert_same(state(model), before)


METHODS = {
    "rtn": "rtn", "smoothquant": "smoothquant", "columns": quantkit.LLMInt8(2), "auto columns": "llm_int8", "rptq": "rptq",
    "hadamard": "hadamard", "gptq": "gptq", "rptq and gptq": [RPTQ(4, by="kmeans"), "gptq"],
    "omniquant": quantkit.OmniQuant(epochs=1), "rotate": "rotate",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_weights_only(method: Any) -> None:
    """The same model as one whose linears hold what the codes of the weights stand for."""
    original = llama()
    model = quantized(copy.deepcopy(original), "w6a16", method)
    assert error_of(model, original) < 0.05
    plain = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, W8A8Linear):
            assert layer.scheme.name == "w6a16"
            quantkit.model.modules.replace_module(plain, name, layer.to_float())
    assert torch.allclose(outputs(model, tokens())[0], outputs(plain, tokens())[0], atol=2e-6)
    assert outputs(copy.deepcopy(model).bfloat16(), tokens())[0].dtype == torch.bfloat16


def test_gradients_of_weights_only() -> None:
    layer = quantized(mlp(), "w4a16", calibration=[normal(2, 5, 16)]).up
    x = normal(3, 16).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.dequantized_weight().sum(0).expand(3, 16), atol=1e-5)


def test_a_threshold_has_nothing_to_keep() -> None:
    with pytest.raises(MethodError, match="threshold"):
        quantized(llama(), "w4a16", quantkit.LLMInt8(threshold=6.0))


# ---- refused, or interrupted


class Twice(nn.Module):
    """One module, two calls of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return F.scaled_dot_product_attention(x[..., :4], x[..., :4], x) + F.scaled_dot_product_attention(x, x, x)


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.up(x).view(1, -1, 2, 4).transpose(1, 2), self.up(x).view(1, 1, -1, 4)
        return F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1)[:, :3].repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), k)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(*[self.up(x)] * 3, need_weights=False)[0]
        return y


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, list[str]]] = {
    "no attention": (mlp, normal(1, 3, 16), ["MLP makes no call", "sdpa", "scaled_dot_product_attention"]),
    "eager": (lambda: llama(attn_implementation="eager"), tokens(), ["attn_implementation='sdpa'"]),
    "different calls": (Twice, normal(1, 3, 8), ["'Twice'", "differ in size", "[1, 3, 8]"]),
    "hidden": (Hidden, normal(1, 3, 8), ["nn.MultiheadAttention", "leave out -kv"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(case: str) -> None:
    build, batch, words = REFUSED[case]
    model = build()
    before = state(model)
    with pytest.raises(ModelError) as caught:
        quantkit.quantize(model, ["rptq"], scheme=PAPER.replace("-norm8", ""), calibration=[batch, batch], progress=False)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_same(state(model), before)


def test_a_generator_cannot_be_walked_again() -> None:
    for scheme, method in (("w4a16-static-kv4", "rtn"), ("w4a16-kv4", "rptq")):
        with pytest.raises(CalibrationError, match="calibrating attention"):
            quantized(llama(), scheme, method, calibration=(t for t in [tokens()]))
    assert attention_quantizers(quantized(llama(), "w4a16-kv4", calibration=(t for t in [tokens()])))


class Stops:
    """Batches that come whole so many times, and then are interrupted."""

    def __init__(self, times: int, error: type[BaseException]) -> None:
        self.left, self.error = times, error

    def __iter__(self) -> Any:
        for _ in range(2):
            if not self.left:
                raise self.error
            self.left -= 1
            yield tokens()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_calibration_is_undone(error: type[BaseException]) -> None:
    """A look at the first batch, a pass for the linears, and then the one for attention, of a model converted for a while."""
    model = llama()
    before = state(model)
    with pytest.raises(error):
        quantized(model, PAPER, calibration=Stops(4, error))
    assert not attention_quantizers(model)
    assert all("forward" not in vars(m) for m in model.modules())
    assert_same(state(model), before)
    quantized(model, PAPER)


def test_data_that_does_not_reach_attention() -> None:
    class Sometimes(Bare):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) > 1 else x + self.out(self.qkv(self.norm(x))[..., :12])

    class Fewer(Stops):
        def __iter__(self) -> Any:
            self.left -= 1
            yield normal(2 if self.left > 0 else 1, 9, 12)

    with pytest.raises(CalibrationError, match="no token of the calibration data reached the key"):
        quantized(Sometimes(), "w8a8-static-kv4", calibration=Fewer(3, RuntimeError))

    class Later(Nested):
        def forward(self, x: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(x, x, x)
            z: Tensor = self.inner(y) if len(x) > 1 else self.inner.out(self.inner.qkv(self.inner.norm(y))[..., :12])
            return z

    with pytest.raises(CalibrationError, match="'inner' is called in the calibration data and was not in its first batch"):
        quantized(Later(), "w8a8-static-kv4", calibration=[normal(1, 9, 12), normal(2, 9, 12)])


# ---- checkpoints


SAVED = {
    "weights only": ("w4a16", "rtn"),
    "per token": (DYNAMIC, "rtn"),
    "per token, clusters": (DYNAMIC, RPTQ(8, by="kmeans")),
    "paper": (PAPER, RPTQ(8, by="kmeans")),
    "cache": ("w3a16-static-asym-kv3", RPTQ(8, by="kmeans")),
}


@pytest.mark.parametrize("case", SAVED)
def test_saved_and_loaded(case: str, tmp_path: Path) -> None:
    scheme, method = SAVED[case]
    model = quantized(llama(), scheme, method)
    wanted, said = outputs(model, tokens(seed=5)), quantkit.report(model).summary
    assert scheme in said
    assert ("model.layers.#.self_attn" in said) == ("kv" in scheme)
    loaded = quantkit.load(quantkit.save(model, tmp_path / "ours"))
    assert_same(outputs(loaded, tokens(seed=5)), wanted)
    assert quantkit.report(loaded) == quantkit.report(model)
    assert quantkit.report(loaded).summary == said
    version = json.loads((tmp_path / "ours" / "quantkit.json").read_text())["format_version"]
    assert version == (6 if "kv" in scheme else 5)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["format_version"] == version
    model.save_pretrained(tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert_same(outputs(theirs, tokens(seed=5)), wanted)
    assert ("self_attn" in quantkit.report(theirs).summary) == ("kv" in scheme)
    assert_same(outputs(quantkit.load(quantkit.save(theirs, tmp_path / "again")), tokens(seed=5)), wanted)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert ("attention" in config) == ("kv" in scheme)
    with pytest.raises(ModelError, match="simula"):
        quantkit.export(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    model = quantized(Bare(), PAPER, "rptq")
    loaded = quantkit.load(quantkit.save(model, tmp_path / "x"), model=Bare())
    assert_same(outputs(loaded, data_of(model)), outputs(model, data_of(model)))


def test_eight_bit_linears_are_not_exported_without_their_attention(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="attention of this model is rounded as w8a8-kv8"):
        quantkit.export(quantized(llama(), "w8a8-kv8"), tmp_path / "x")


def test_from_pretrained_reads_the_whole_model_first(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    wanted = outputs(quantized(copy.deepcopy(model), DYNAMIC), tokens())
    config = quantkit.QuantKitConfig("rtn", DYNAMIC)
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert_same(outputs(got, tokens()), wanted)
    got.dequantize()
    assert not attention_quantizers(got)
    assert error_of(got, model) < 0.02
    detach_attention(got)


def change(**facts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["attention"][""].update(facts)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "none": (lambda body: body.pop("attention"), ["'attention' is missing"]),
    "none of them": (lambda body: body.update(attention={}), ["'attention' is missing or malformed"]),
    "a list": (lambda body: body.update(attention=[""]), ["'attention' is missing or malformed"]),
    "an older version": (lambda body: body.update(format_version=3), ["'attention' is missing or malformed"]),
    "no record": (lambda body: body["attention"].update({"": 3}), ["attention of ''", "damaged"]),
    "a fact of another type": (change(width=6.0), ["damaged"]),
    "no such module": (lambda body: body["attention"].update(x=body["attention"].pop("")), ["'x'", "does not have"]),
    "a layer": (lambda body: body["attention"].update(out=body["attention"].pop("")), ["'out'", "does not have"]),
    "unknown scheme": (change(scheme="w9a8-kv4"), ["w9a8-kv4", "bits=9"]),
    "scheme of linears": (change(scheme="w4a8"), ["w4a8 does not quantize it"]),
    "no heads": (change(keys=0), ["sizes go from 1"]),
    "heads that do not share": (change(queries=3), ["3 query heads share 2"]),
    "huge": (change(queries=2 * 10**30), ["sizes go from 1"]),
    "another width": (change(width=7), ["shape [2, 6]", "needs [2, 7]"]),
    "no clusters": (change(clusters=0), ["0 clusters"]),
    "more clusters than channels": (change(clusters=7), ["7 clusters"]),
    "fewer clusters": (change(clusters=1), ["_range", "needs [2, 2, 1]"]),
    "dynamic": (change(scheme="w4a4-kv4-attention4"), ["_range", "no place"]),
    "a layer with attention": (lambda b: b["layers"]["out"].update(scheme="w4a4-static-asym-kv4"), ["'out'", "more than"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_hostile_records(case: str, tmp_path: Path) -> None:
    folder, file = quantkit.save(quantized(Bare(), PAPER, "rptq"), tmp_path / "x"), tmp_path / "x" / "quantkit.json"
    assert quantkit.load(folder, model=Bare())
    damage, words = RECORDS[case]
    body = json.loads(file.read_text())
    del body["digest"]
    damage(body)
    file.write_text(json.dumps(body | {"digest": digest_of(body)}))
    model = Bare()
    before = state(model)
    with pytest.raises(CheckpointError) as caught:
        quantkit.load(folder, model=model)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_same(state(model), before)


def test_configurations_that_contradict_themselves() -> None:
    for options in ({"attention": {"a": {}}}, {"format_version": 4}):
        with pytest.raises(CheckpointError, match="damaged"):
            quantkit.QuantKitConfig("rtn", "w8a8-kv4", layers={"x": {}}, **options)


def test_attached_and_detached() -> None:
    model, x = Bare(), normal(2, 9, 12)
    wanted = model(x)
    attach_attention(model, {"": AttentionQuantizer(Scheme.parse("w8a8-kv2"), HeadSizes(2, 2, 6, 6))})
    assert not torch.equal(model(x), wanted)
    detach_attention(model)
    assert_same(model(x), wanted)
