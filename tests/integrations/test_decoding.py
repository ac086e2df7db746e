"""generate() with captured steps beside generate() as it is: the same logits but for their last bits, whatever is asked for."""

from __future__ import annotations

import copy
import gc
import io
import logging
from typing import Any

import pytest
import torch
import transformers
from helpers import VOCAB, gpt2, llama, tokens
from torch import Tensor, nn
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList, TextStreamer

import quantkit
from quantkit import LLMInt8, ModelError, capture_decoding, release_decoding

pytestmark = pytest.mark.usefixtures("found_once")

X = tokens(1, 7)
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
METHODS: dict[str, Any] = {
    "float": None, "rtn": "rtn", "smoothquant": "smoothquant", "columns": LLMInt8(columns=2),
    "threshold": LLMInt8(threshold=2.0), "rotation": "best", "rptq": "rptq",
}  # fmt: skip


def made(method: str = "smoothquant", base: Any = llama, **options: Any) -> Any:
    torch.manual_seed(1)
    model = base(**options)
    model.generation_config.eos_token_id = None
    if METHODS[method] is not None:
        quantkit.quantize(model, METHODS[method], heads=method != "rptq", calibration=[tokens(4, 20)], progress=False)
    return model


def said(model: Any, ids: Tensor = X, **options: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"max_new_tokens": 12, "do_sample": False}
    return model.generate(ids, output_logits=True, return_dict_in_generate=True, **defaults | options)


def alike(got: Any, wanted: Any, tolerance: float = 2e-2) -> None:
    """Equal logits until a token differs, which it may only where two were as good."""
    for i, (a, b) in enumerate(zip(got.logits, wanted.logits, strict=True)):
        error = float((a - b).norm() / b.norm())
        assert error < tolerance, (i, error)
        n = wanted.sequences.shape[1] - len(wanted.logits) + i
        if not torch.equal(got.sequences[:, n], wanted.sequences[:, n]):
            top = b.topk(2, dim=-1).values
            assert float((top[:, 0] - top[:, 1]).min()) < 2 * float((a - b).abs().max())
            return


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="quantkit")
    return caplog


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, heard: pytest.LogCaptureFixture) -> None:
    model = made(method)
    wanted = said(model)
    assert capture_decoding(model) is model
    heard.clear()
    for _ in range(2):
        alike(said(model), wanted)
    assert heard.text.count("replays a captured step") == 1
    release_decoding(model)
    assert torch.equal(said(model).sequences, wanted.sequences)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_runs_in_c(dtype: torch.dtype, heard: pytest.LogCaptureFixture) -> None:
    model = capture_decoding(made().to(dtype))
    said(model)
    assert "operations in C" in heard.text
    # up to 5.22 transformers makes the angles of positions by a product, once per token
    assert "through PyTorch" not in heard.text.replace("; through PyTorch: aten.bmm.default (1)\n", "")


def test_sizes(heard: pytest.LogCaptureFixture) -> None:
    model = made("rtn")
    captured = capture_decoding(copy.deepcopy(model))
    for ids in (X, tokens(1, 3), tokens(3, 5), tokens(2, 9), tokens(20, 4), X):
        for new in (12, 5):
            alike(said(captured, ids, max_new_tokens=new), said(model, ids, max_new_tokens=new))
    assert len(vars(captured)["_quantkit_decoding"]._steps) <= 4


def test_padding() -> None:
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.int64)
    mask[0, :5], mask[1, :2] = 0, 0
    ids[mask == 0] = 0
    model = made("rtn")
    wanted = said(model, ids, attention_mask=mask)
    alike(said(capture_decoding(model), ids, attention_mask=mask), wanted)


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 5},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.3},
    "stopping": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(max_length=11)])},
    "no cache": {"use_cache": False},
    "a cache that grows": {"cache_implementation": "dynamic"},
    "hidden states": {"output_hidden_states": True},
    "a config": {"generation_config": GenerationConfig(max_new_tokens=9, do_sample=False)},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways(way: str) -> None:
    model, options = made("float"), WAYS[way]
    wanted = said(model, **options)
    capture_decoding(model)
    for _ in range(2):
        got = said(model, **options)
        assert torch.equal(got.sequences, wanted.sequences)
        for a, b in zip(got.logits, wanted.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(got.hidden_states or (), wanted.hidden_states or (), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_streamers() -> None:
    class Words(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten())

        def end(self) -> None:
            self.seen.append(torch.tensor([-1]))

    model = capture_decoding(made("float"))
    words = Words()
    got = said(model, streamer=words)
    assert torch.equal(torch.cat(words.seen), torch.cat([got.sequences[0], torch.tensor([-1])]))


def test_caches_that_users_keep() -> None:
    """The cache of one call still holds what it held when the next call has run."""
    model = capture_decoding(made("float"))
    first = said(model)
    keys = [layer.keys.clone() for layer in first.past_key_values.layers]
    second = said(model, tokens(1, 7, seed=3))
    assert all(torch.equal(layer.keys, k) for layer, k in zip(first.past_key_values.layers, keys, strict=True))
    assert not torch.equal(second.past_key_values.layers[0].keys, keys[0])


def test_models_that_change() -> None:
    model, other = made("rtn"), made("rtn", tie_word_embeddings=True)
    capture_decoding(model)
    said(model)
    state = {k: v for k, v in other.state_dict().items() if k in model.state_dict()}
    model.load_state_dict(state, assign=True)
    plain = made("rtn")
    plain.load_state_dict(state, assign=True)
    wanted = said(plain)
    alike(said(model), wanted)
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    said(model)
    assert seen
    with quantkit.use_backend("reference"):
        alike(said(model), wanted)


OTHERS: dict[str, Any] = {
    "GPT-2": lambda **_: gpt2(),
    "sliding windows": lambda **_: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=6)),
    "Gemma2": lambda **_: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=6)),
    "Qwen3": lambda **_: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),
    "experts": lambda **_: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "biases": lambda **_: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES)),
}


@pytest.mark.parametrize("window", [12, 64])
@pytest.mark.parametrize("family", ["Mistral", "Gemma3Text"])
def test_windows_that_are_not_full_yet(family: str, window: int, heard: pytest.LogCaptureFixture) -> None:
    """Until they are, Python counts their tokens: these steps run in eager mode."""
    config = getattr(transformers, family.replace("Text", "") + ("TextConfig" if "Text" in family else "Config"))
    kind = getattr(transformers, family.replace("Text", "") + "ForCausalLM")
    model = made("float", lambda **_: kind(config(**SIZES, head_dim=8, sliding_window=window)).eval())
    wanted = [said(model, max_new_tokens=20), said(model, tokens(1, 4), max_new_tokens=9)]
    capture_decoding(model)
    heard.clear()
    for _ in range(2):
        alike(said(model, max_new_tokens=20), wanted[0], 1e-4)
        alike(said(model, tokens(1, 4), max_new_tokens=9), wanted[1], 1e-4)
    assert heard.text.count("a sliding window of the cache is not full yet") == 1
    assert ("replays a captured step" in heard.text) is (window == 12)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("method", ["float", "rtn"])
def test_architectures(kind: str, method: str) -> None:
    model = made(method, OTHERS[kind]).eval()
    wanted = said(model)
    capture_decoding(model)
    for _ in range(2):
        alike(said(model), wanted)


def test_copies() -> None:
    """A copy captures steps of its own, and so does one that was saved as a whole."""
    model = capture_decoding(made("float"))
    first = said(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert not any(logits.any() for logits in said(other).logits)
        release_decoding(other)
        assert "generate" in vars(model)
    assert torch.equal(said(model).sequences, first.sequences)


def test_models_without_a_static_cache() -> None:
    with pytest.raises(ModelError, match="CapturedStep"):
        capture_decoding(nn.Linear(2, 2))
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": VOCAB}
    with pytest.raises(ModelError, match="static cache"):
        capture_decoding(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))


def test_nothing_is_kept_alive() -> None:
    model = capture_decoding(made("float"))
    said(model)
    steps = vars(model)["_quantkit_decoding"]._steps
    release_decoding(model)
    gc.collect()
    assert not steps
