"""Tiny models, and one comparison that shows where two things first differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import quantkit
from quantkit import PerSite, Plan, Range, Scheme, Stage, W8A8Linear
from quantkit.core.facts import Facts
from quantkit.core.formats import PerTensor, Quantized
from quantkit.core.operand import Operand
from quantkit.core.weights import quantize_weight
from quantkit.model.modules import tensors_in

VOCAB, WIDTH = 64, 32
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCAB - 3))]
TEXT = " ".join(WORDS[3 + i * i % (VOCAB - 3)] for i in range(200))


class MLP(nn.Module):
    """A residual block: the norm feeds ``up`` and the rows of ``up`` feed ``down`` through a ReLU, so both sites fold."""

    def __init__(self, width: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def mlp(*, outliers: bool = False, **sizes: int) -> MLP:
    model = MLP(**sizes).eval()
    if outliers:
        with torch.no_grad():
            model.norm.weight[::7] *= 50
            model.up.weight[::5] *= 20
    return model


def llama(**options: Any) -> Any:
    """Two layers, grouped-query attention, a head of its own."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | options)).eval()


def write_llama(folder: Path) -> Path:
    """The folder of a small Llama with a tokenizer, for which a token is a word."""
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def gpt2() -> Any:
    """Linears that store their weight transposed (Conv1D), and a head tied to the embedding."""
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 1, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def example(model: nn.Module) -> Tensor:
    """An input the model accepts."""
    return normal(2, 5, model.norm.normalized_shape[0]) if isinstance(model, MLP) else tokens()


@torch.no_grad()
def outputs(model: nn.Module, batch: Any = None) -> list[Tensor]:
    return list(tensors_in(model(example(model) if batch is None else batch)))


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a failed call may not have touched: bits, types, hooks, flags, attributes of instances."""
    facts = {
        name: (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for name, m in model.named_modules()
    }
    return {"bits": {k: v.clone() for k, v in model.state_dict().items()}, "modules": facts}


def assert_same(got: Any, wanted: Any, where: str = "") -> None:
    """Bit for bit, but for the payload of NaN; fails with the first difference."""
    if isinstance(wanted, Tensor):
        assert isinstance(got, Tensor), f"{where}: a {type(got).__name__} for a tensor"
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), (
            f"{where}: {got.shape} {got.dtype}, {wanted.shape} {wanted.dtype}"
        )
        if wanted.is_meta:
            return
        same = (got == wanted) & (got.signbit() == wanted.signbit()) | got.isnan() & wanted.isnan()
        if not same.all():
            index = tuple((~same).nonzero()[0].tolist())
            pair = f"{got[index].item()!r} for {wanted[index].item()!r}"
            raise AssertionError(f"{where}: {int((~same).sum())} of {same.numel()} differ, first at {index}: {pair}")
    elif isinstance(wanted, Mapping):
        assert list(got) == list(wanted), f"{where}: {set(got) ^ set(wanted)}"
        for key in wanted:
            assert_same(got[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted), f"{where}: {len(got)} for {len(wanted)} items"
        for i, pair in enumerate(zip(got, wanted, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert got == wanted, f"{where}: {got!r} for {wanted!r}"


def quantized(model: nn.Module, method: Any = "smoothquant", **options: Any) -> Any:
    options.setdefault("calibration", [normal(2, 9, 16)] if not hasattr(model, "config") else [tokens()])
    return quantkit.quantize(model, method, progress=False, **options)


def int8(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, W8A8Linear)}


@contextmanager
def refused(model: nn.Module, error: type[BaseException], *words: str) -> Iterator[None]:
    """The call inside raises exactly ``error``, its message holds all ``words``, and the model is as it was."""
    before = state(model)
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert_same(state(model), before)


class Fixed:
    """A calibrator that says what it is told."""

    name, statistics = "fixed", (Range,)

    def __init__(self, stage: Stage = Stage.SCALE, **plan: Any) -> None:
        self.stage, self.answer = stage, Plan(**plan)

    def plan(self, view: Any) -> Plan:
        return self.answer


class FixedRotate(Fixed):
    name = "rotate"


class Odd(PerSite):
    """A calibrator that does one thing wrong."""

    name, stage, statistics = "odd", Stage.SCALE, ()

    def __init__(self, does: Any) -> None:
        self.does = does

    def plan_site(self, site: Any) -> Any:
        return self.does(site)


# ---- operands


def clusters(k: int) -> tuple[int, ...]:
    """Three runs of channels at borders where a rotation may have them, or what there is room for."""
    block = math.gcd(k, 64)
    sizes = (block, (k // block - 1) // 2 * block)
    return tuple(size for size in (*sizes, k - sum(sizes)) if size)


def hostile(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of every size, ties of rounding, zeros, subnormals, values near overflow, NaN and infinities."""
    x = torch.randn(m, k) * torch.logspace(-4, 4, max(m, 1))[:m, None]
    rows = [
        torch.zeros(k), torch.full((k,), 1e-44), torch.arange(k) % 255 - 127.0, torch.full((k,), 3e38), torch.full((k,), -5.0),
        torch.full((k,), math.nan), torch.ones(k).index_fill(0, torch.tensor(k - 1), math.inf),
        torch.ones(k).index_fill(0, torch.tensor(0), -math.inf), (torch.arange(k) % 127) / 2, torch.full((k,), -0.0),
        torch.full((k,), 3e38).index_fill(0, torch.tensor(0), -3e38),
    ]  # fmt: skip
    for i, row in enumerate(rows[: max(m - 2, 0)]):
        x[1 + i] = row
    return x.to(dtype)


def near(got: Tensor, wanted: Tensor, what: str) -> None:
    """Row by row: as NaN, or off by no more than a code that rounds the other way here and there."""
    assert_same(got.isfinite().all(-1), wanted.isfinite().all(-1), what)
    for one, other in zip(got.float(), wanted.float(), strict=True):
        if other.isfinite().all():
            assert (one - other).norm() <= 0.02 * other.norm() + 1e-30, what


def operand(
    k: int,
    n: int,
    scheme: str = "w8a8",
    steps: tuple[str, ...] = (),
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Operand:
    """An operand with random values, made without any module; ``steps`` are ``groups`` and what a rewrite consists of."""
    random = torch.Generator().manual_seed(seed)
    own, groups = Scheme.parse(scheme), clusters(k) if "groups" in steps else ()
    weight = torch.randn(n, k, generator=random) * torch.logspace(-2, 2, n)[:, None]
    codes, scale = quantize_weight(
        weight, own.weight.number.bits, per_tensor=own.weight.granularity == PerTensor(), groups=groups
    )
    groups = groups if len(groups) > 1 else ()
    order, outliers = torch.randperm(k, generator=random), torch.randperm(k, generator=random)[: max(1, k // 20)]
    if "outliers" in steps:
        codes[:, outliers if "permutation" not in steps else order.argsort()[outliers]] = 0
    values = {
        "bias": torch.randn(n, generator=random).to(dtype) if bias else None,
        "shift": torch.randn(k, generator=random),
        "pre_scale": torch.rand(k, generator=random) + 0.5,
        "permutation": order,
        "rotation_signs": torch.randint(0, 2, (k,), generator=random) * 2.0 - 1,
        "outlier_index": outliers,
        "outlier_weight": torch.randn(n, len(outliers), generator=random).to(dtype),
    }
    names = {"rotation": ["rotation_signs"], "outliers": ["outlier_index", "outlier_weight"]}
    given = {name for step in steps for name in names.get(step, [step])} | {"bias"}
    tensors = {name: value if name in given else None for name, value in values.items()}
    if isinstance(own.input, Quantized) and own.input.is_static:
        count = max(1, len(groups))
        tensors["input_scale"] = torch.rand(count, generator=random) * 0.02 + 0.01
        if not own.input.number.symmetric:
            tensors["input_zero_point"] = torch.randint(-20, 20, (count,), dtype=torch.int32, generator=random)
    block = math.gcd(k, 64) if "rotation" in steps else None
    facts = Facts(k, n, own, groups, block, 6.0 if "threshold" in steps else None)
    return Operand.of(facts, {"weight": codes, "weight_scale": scale[:, : 1 + len(groups)], **tensors})
