"""The models whose bits are recorded: tiny, and with weights that are the same on every machine.

The checkpoints in tests/fixtures/checkpoints need the classes here to be opened: do not change their layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from digests import normal
from torch import Tensor, nn

VOCAB, WIDTH, INNER, TOKENS = 64, 64, 96, 24
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "attn_implementation": "sdpa", **IDS,
}  # fmt: skip
OUTLIERS = 17
"""Every so many channels of a norm are louder than the others, as in large language models."""


def llama(**options: Any) -> Any:
    """Grouped-query attention, and a head of its own."""
    return filled(transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | options)), seed=10)


def gpt2() -> Any:
    """Conv1D, which keeps its weight transposed, biases everywhere, and a head that is tied to the embedding."""
    sizes = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 128}
    config = transformers.GPT2Config(**sizes, attn_implementation="sdpa", **IDS)
    return filled(transformers.GPT2LMHeadModel(config), seed=20)


def qwen3_moe(**options: Any) -> Any:
    """A dense layer, and one with three experts that are one parameter; norms over queries and keys."""
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0], "head_dim": 16}
    return filled(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**BASE | experts | options)), seed=30)


MODELS = {"llama": llama, "gpt2": gpt2, "qwen3-moe": qwen3_moe}


def filled(model: nn.Module, seed: int) -> Any:
    """``model`` in eval mode with weights that depend on the seed and the order of its parameters alone."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            value = normal(*parameter.shape, seed=1000 * seed + index)
            if parameter.dim() > 1:
                parameter.copy_(value * 0.08)
            elif name.endswith("bias"):
                parameter.copy_(value * 0.1)
            else:  # of a norm
                parameter.copy_(1 + value * 0.1)
                if len(parameter) > 16:  # not of queries or keys
                    parameter[3::OUTLIERS] *= 12
    return model.eval()


def tokens(batch: int = 2, length: int = TOKENS, *, seed: int) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- plain PyTorch, for checkpoints


class MLP(nn.Module):
    """A residual block: the norm feeds ``up``, and GELU keeps the scale in front of ``down`` at run time."""

    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.c_fc, self.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """A teaching GPT: fused queries, keys and values, GELU, and a head that is tied to the embedding."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(TOKENS, width)
        self.h = nn.ModuleList([Block(width, heads) for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))
