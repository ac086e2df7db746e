"""Tiny random models of every family, each with the sites that discovery must find, derived by hand.

A transformer block has four sites: what q/k/v read, what the attention's output projection reads, what the first layer of
the MLP reads, and what its last layer reads. A pre-norm feeds the first and the third; the rows of v feed the second through
an attention that averages tokens; the rows of "up" feed the fourth if the activation is gated (``act(gate) * up``) or
homogeneous (ReLU, squared ReLU), and nothing does behind GELU. The table says "4/3" for four sites of which three fold, and
comments only on what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

VOCAB, WIDTH, INNER, LAYERS, HEADS, TOKENS = 96, 32, 48, 2, 4, 12

HEAD = {"lm_head": "output head"}
TIED = {"lm_head": "its weight is tied"}
READ = "other code of the model reads its weight"


@dataclass(frozen=True)
class Family:
    """One model and what discovery must say of it.

    Attributes:
        build: makes the model; the weights are random anyway.
        sites, foldable: how many there are, and how many have a producer.
        kept: glob -> start of the reason, for the linears that stay in floating point.
        batch: what the model is called on.
    """

    build: Callable[[], nn.Module]
    sites: int
    foldable: int
    kept: Mapping[str, str] = field(default_factory=dict)
    batch: Callable[[], Any] = lambda: tokens()


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (batch, TOKENS), generator=torch.Generator().manual_seed(7))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def hf(name: str, head: str = "ForCausalLM", config: str = "Config", **options: Any) -> Callable[[], nn.Module]:
    """A transformers model by the stem of its class names."""

    def build() -> nn.Module:
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return getattr(T, name + head)(getattr(T, name + config)(**ids | options))

    return build


LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
GQA = LLAMA | {"num_key_value_heads": 2}
MHA = LLAMA | {"num_key_value_heads": HEADS}
WIDE = GQA | {"head_dim": 16}  # heads wider than hidden / heads
BASE = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
ENCODER = {k: v for k, v in LLAMA.items() if k != "vocab_size"}
OPT = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "ffn_dim": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


# ---- plain PyTorch -----------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn = LayerNorm(width, bias), CausalSelfAttention(width, heads, bias)
        self.ln_2 = LayerNorm(width, bias)
        layers = {"c_fc": nn.Linear(width, 4 * width, bias), "act": activation, "c_proj": nn.Linear(4 * width, width, bias)}
        self.mlp = nn.Sequential()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The usual teaching GPT: fused qkv, GELU, tied head, ``(logits, loss)`` out."""

    def __init__(self, bias: bool = True, activation: Callable[[], nn.Module] = nn.GELU, shared: bool = False) -> None:
        super().__init__()
        blocks = [NanoBlock(WIDTH, HEADS, bias, activation()) for _ in range(1 if shared else LAYERS)]
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.h, self.rounds = nn.ModuleList(blocks), LAYERS if shared else 1
        self.ln_f, self.lm_head = LayerNorm(WIDTH, bias), nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for _ in range(self.rounds):
            for block in self.h:
                x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class Expert(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    """Experts as modules, and a router with a name of its own that chooses by top-k."""

    def __init__(self, width: int = WIDTH, inner: int = INNER, experts: int = 4, k: int = 2, used: int | None = None) -> None:
        super().__init__()
        self.norm, self.chooser = nn.LayerNorm(width), nn.Linear(width, experts)
        self.experts, self.k = nn.ModuleList(Expert(width, inner) for _ in range(experts)), k
        self.unused = torch.arange(experts) >= (used or experts)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, chosen = self.chooser(h).masked_fill(self.unused, float("-inf")).softmax(-1).topk(self.k, dim=-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            *where, slot = torch.where(chosen == i)
            if len(slot):
                y[tuple(where)] += expert(h[tuple(where)]) * weights[(*where, slot)][:, None]
        return x + y


class MoELM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks, self.norm = nn.Sequential(*(MixtureOfExperts() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))


def relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


# ---- the table ---------------------------------------------------------------------------------------------------------------

CORE = {
    "llama": Family(hf("Llama", **GQA), 8, 8, HEAD),
    "qwen2": Family(hf("Qwen2", **GQA), 8, 8, HEAD),
    "qwen3": Family(hf("Qwen3", **WIDE), 8, 8, HEAD),  # norms on q and k do not touch v
    "mistral": Family(hf("Mistral", **GQA), 8, 8, HEAD),
    "gpt2": Family(hf("GPT2", "LMHeadModel", **GPT2), 8, 6, TIED),  # GELU; Conv1D, qkv fused
    "opt": Family(hf("OPT", **OPT, word_embed_proj_dim=WIDTH), 8, 8, TIED),  # ReLU
    # Post-norm: the norms' outputs are the residual stream, so only v and ReLU fold. Embeddings narrower than the blocks add
    # project_in (reads an embedding) and project_out, the only reader of the last norm.
    "opt-post-norm": Family(hf("OPT", **OPT, word_embed_proj_dim=16, do_layer_norm_before=False), 10, 5, TIED),
    "gpt-neox": Family(hf("GPTNeoX", **LLAMA), 8, 6, HEAD),  # GELU; parallel blocks, but a norm for each branch
    "phi3": Family(hf("Phi3", **GQA), 8, 8, HEAD),  # qkv fused, gate and up fused
    "gemma2": Family(hf("Gemma2", **WIDE), 8, 8, TIED),  # norms behind the branches feed no linear
    # The experts are one parameter each way, no linears: two sites less a block.
    "mixtral": Family(hf("Mixtral", **GQA, num_local_experts=4), 4, 4, HEAD),
    "bert": Family(hf("Bert", "Model", **LLAMA), 8, 2, {"pooler.dense": "output head"}),  # post-norm and GELU: v alone
    "nanogpt": Family(NanoGPT, 8, 6, TIED),
    "nanogpt-no-bias": Family(partial(NanoGPT, bias=False), 8, 6, TIED),
}

VARIED = {
    "bloom": Family(hf("Bloom", vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS), 8, 6, TIED),
    # One norm for both branches (3/2), one key/value head at the end of the fused qkv.
    "falcon": Family(hf("Falcon", **LLAMA), 6, 4, TIED),
    "falcon-sequential": Family(hf("Falcon", **LLAMA, parallel_attn=False, multi_query=False), 8, 6, TIED),
    "falcon-new": Family(hf("Falcon", **LLAMA, new_decoder_architecture=True, num_kv_heads=2), 8, 6, TIED),
    "gptj": Family(hf("GPTJ", **GPT2, rotary_dim=4), 6, 4, HEAD),  # one norm for both branches, GELU
    "codegen": Family(hf("CodeGen", **GPT2, rotary_dim=4), 6, 4, HEAD),  # the same; fused as four blocks of q, v, k
    "gpt-neo": Family(
        hf(
            "GPTNeo", vocab_size=VOCAB, hidden_size=WIDTH, num_layers=LAYERS, num_heads=HEADS,
            attention_types=[[["global", "local"], 1]],
        ),
        8, 6, TIED,
    ),
    "openai-gpt": Family(hf("OpenAIGPT", "LMHeadModel", **GPT2), 8, 2, TIED),  # post-norm, GELU: v alone
    "gpt-bigcode": Family(hf("GPTBigCode", **GPT2), 8, 6, TIED),  # one key/value head, GELU
    "mpt": Family(
        hf("Mpt", d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, vocab_size=VOCAB, expansion_ratio=2, max_seq_len=64),
        8, 6, TIED,
    ),
    "persimmon": Family(hf("Persimmon", **LLAMA), 8, 8, HEAD),  # squared ReLU
    "nemotron": Family(hf("Nemotron", **GQA), 8, 8, HEAD),  # squared ReLU, LayerNorm of (1 + w)
    "arcee": Family(hf("Arcee", **GQA), 8, 8, HEAD),  # squared ReLU
    "olmo": Family(hf("Olmo", **GQA), 8, 4, HEAD),  # its norms have no parameters: v and up
    "olmo-clipped": Family(hf("Olmo", **GQA, clip_qkv=1.0), 8, 2, HEAD),  # v is clamped: up alone
    "olmo2": Family(hf("Olmo2", **GQA), 8, 4, HEAD),  # norms behind the branches: q/k/v and gate/up read the stream
    "exaone4": Family(hf("Exaone4", **GQA, layer_types=["full_attention"] * 2), 8, 4, HEAD),  # the same
    "cohere": Family(hf("Cohere", **GQA), 6, 6, TIED),  # one norm for both branches, gated
    "cohere2": Family(hf("Cohere2", **GQA), 6, 6, TIED),
    "starcoder2": Family(hf("Starcoder2", **GQA), 8, 6, TIED),  # GELU
    "stablelm": Family(hf("StableLm", **GQA), 8, 8, HEAD),
    "stablelm-parallel": Family(hf("StableLm", **GQA, use_parallel_residual=True), 6, 6, HEAD),
    "phi": Family(hf("Phi", **GQA), 6, 4, HEAD),  # one norm for both branches, GELU
    "granite": Family(hf("Granite", **GQA, embedding_multiplier=3.0, residual_multiplier=0.5), 8, 8, HEAD),
    "gemma": Family(hf("Gemma", **WIDE), 8, 8, TIED),
    "gemma3": Family(hf("Gemma3", config="TextConfig", **WIDE), 8, 8, TIED),
    "glm": Family(hf("Glm", **GQA, head_dim=8), 8, 8, HEAD),
    "glm4": Family(hf("Glm4", **GQA, head_dim=8), 8, 8, HEAD),
    "llama-bias": Family(hf("Llama", **MHA, attention_bias=True, mlp_bias=True), 8, 8, HEAD),
    "smollm3": Family(hf("SmolLM3", **GQA), 8, 8, TIED),
    "helium": Family(hf("Helium", **GQA, head_dim=8), 8, 8, HEAD),
    "ernie4.5": Family(hf("Ernie4_5", **GQA), 8, 8, TIED),
    "seed-oss": Family(hf("SeedOss", **GQA, head_dim=8), 8, 8, HEAD),
    "hunyuan": Family(hf("HunYuanDenseV1", **GQA, head_dim=8), 8, 8, HEAD),
    "apertus": Family(hf("Apertus", **GQA), 8, 6, HEAD),  # xIELU is no ReLU
    "bitnet": Family(hf("BitNet", **GQA), 8, 8, HEAD),  # a norm before every linear
    "nanochat": Family(hf("NanoChat", **GQA), 8, 4, HEAD),  # norms without parameters: v and squared ReLU
    "diffllama": Family(hf("DiffLlama", **GQA), 8, 6, HEAD),  # heads pass a norm of their own before the output projection
    # The norm before experts feeds parameters and a router that are no linears: the shared expert's gate/up cannot fold.
    "qwen2-moe": Family(
        hf("Qwen2Moe", **GQA, **MOE, shared_expert_intermediate_size=24), 8, 6, HEAD | {"*.shared_expert_gate": "router"}
    ),
    "qwen3-moe": Family(hf("Qwen3Moe", **WIDE, **MOE), 4, 4, HEAD),
    "olmoe": Family(hf("Olmoe", **GQA, num_experts=4, num_experts_per_tok=2), 4, 4, HEAD),
    "granite-moe": Family(hf("GraniteMoe", **GQA, num_local_experts=4, num_experts_per_tok=2), 4, 4, HEAD),
    "gpt-oss": Family(hf("GptOss", **WIDE, num_local_experts=4, num_experts_per_tok=2), 4, 4, HEAD),
    "llama4": Family(
        hf(
            "Llama4", config="TextConfig", **WIDE, num_local_experts=4, intermediate_size_mlp=INNER,
            interleave_moe_layer_step=1,
        ),
        8, 6, HEAD,
    ),
    # Latent attention has six sites: [q_a, kv_a] read the norm, q_b and kv_b a norm each, o the values in the rows of kv_b.
    # The second block routes, so that its shared expert cannot fold.
    "deepseek-v3": Family(
        hf(
            "DeepseekV3", **MHA, n_routed_experts=8, moe_intermediate_size=16, n_group=2, topk_group=1, num_experts_per_tok=2,
            first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=12,
        ),
        12, 11, HEAD,
    ),
    # Gated delta rule, then full attention whose output is gated by rows of q. Both have two sites that fold: a norm with the
    # width of a head feeds the first one's output projection. The shared expert adds 2/1 to each.
    "qwen3-next": Family(
        hf(
            "Qwen3Next", **WIDE, **MOE, shared_expert_intermediate_size=24, linear_num_value_heads=4, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
        ),
        8, 6, HEAD | {"*.shared_expert_gate": "router"},
    ),
    # The same without low rank for q, which joins kv_a: five sites. Values as wide as keys.
    "deepseek-v2": Family(
        hf(
            "DeepseekV2", **MHA, n_routed_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, first_k_dense_replace=1,
            kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1,
        ),
        10, 9, HEAD,
    ),
    # As qwen3-next, but dense: 4/4.
    "qwen3.5": Family(
        hf(
            "Qwen3_5", config="TextConfig", **WIDE, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
        ),
        8, 8, HEAD,
    ),
    # The residual stream is what the norms put out, so only the output projections fold: into a gated norm, and into v.
    "minimax": Family(
        hf("MiniMax", **GQA, num_local_experts=4, layer_types=["linear_attention", "full_attention"], block_size=8, head_dim=8),
        4, 2, HEAD,
    ),
    # in_proj reads the norm; x_proj and out_proj read what SiLU and the scan made of it. dt_proj's weight is read directly.
    "mamba": Family(
        hf("Mamba", **BASE, state_size=4), 6, 2, TIED | {"*.dt_proj": READ},
    ),
    # in_proj reads a norm, and a gated norm feeds out_proj.
    "mamba2": Family(
        hf("Mamba2", **BASE, state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
        4, 4, {"lm_head": READ},  # casts to its dtype
    ),
    # Time mixing is per channel, so all of key, value and receptance read one norm, and the rows of value reach the output.
    "rwkv": Family(
        hf("Rwkv", **BASE, attention_hidden_size=WIDTH, intermediate_size=INNER, context_length=64, rescale_every=0),
        8, 8, {"head": "output head"},
    ),
    "nemotron-h": Family(  # a Mamba-2 block and one of attention, both without an MLP
        hf(
            "NemotronH", **GQA, head_dim=8, layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=8,
            n_groups=2, ssm_state_size=4, chunk_size=8,
        ),
        4, 4, HEAD,
    ),
    "bamba": Family(
        hf(
            "Bamba", **GQA, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=2,
            mamba_chunk_size=8,
        ),
        8, 8, HEAD,
    ),
    # A gated short convolution is linear in each of the three parts of in_proj, so its out_proj folds too.
    "lfm2": Family(hf("Lfm2", **GQA, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False), 8, 8, TIED),
    # A Mamba block (3/1, see above) and one of attention, each with a gated MLP.
    "jamba": Family(
        hf(
            "Jamba", **GQA, num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        9, 7, HEAD | {"*.dt_proj": READ},
    ),
    # Six linears read the first norm, a norm over heads feeds the output projection, and the MLP is gated.
    "xlstm": Family(hf("xLSTM", **BASE, num_heads=HEADS, qk_dim_factor=1.0), 8, 8, {"lm_head": READ}),
    # What leaves the recurrence depends on its input through gates with weights of their own: no fold there.
    "recurrent-gemma": Family(
        hf(
            "RecurrentGemma", **GQA, lru_width=WIDTH, conv1d_width=4, attention_window_size=8,
            block_types=["recurrent", "attention"],
        ),
        8, 7, TIED,
    ),
    # Pre-norm and gated, 4/4, but the first block has no attention norm of its own and reads the stream. The head adds 1/1.
    "modernbert": Family(hf("ModernBert", "ForMaskedLM", **LLAMA), 9, 8, {"decoder": "its weight is tied"}),
    # Post-norm and GELU (4/1); the last norm feeds a dense layer alone, 1/1.
    "roberta": Family(hf("Roberta", "ForMaskedLM", **LLAMA), 9, 3, {"lm_head.decoder": "its weight is tied"}),
    "distilbert": Family(
        hf(
            "DistilBert", "ForSequenceClassification", vocab_size=VOCAB, dim=WIDTH, hidden_dim=INNER, n_layers=LAYERS,
            n_heads=HEADS, max_position_embeddings=64,
        ),
        9, 3, {"classifier": "output head"},
    ),
    # One block used again and again (4/1, post-norm and GELU), and the mapping that widens the embeddings behind a norm.
    "albert": Family(hf("Albert", "Model", **LLAMA, embedding_size=16), 5, 2, {"pooler": "output head"}),
    "vit": Family(
        hf("ViT", "ForImageClassification", **ENCODER, image_size=16, patch_size=8),
        8, 6, {"classifier": "output head"}, lambda: {"pixel_values": normal(2, 3, 16, 16)},
    ),
    "clip": Family(  # two towers, pre-norm and GELU
        lambda: T.CLIPModel(
            T.CLIPConfig(
                text_config=LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
                vision_config=ENCODER | {"image_size": 16, "patch_size": 8},
                projection_dim=24,
            )
        ),
        16, 12, {"*_projection": "output head"}, lambda: {"input_ids": tokens(), "pixel_values": normal(2, 3, 16, 16)},
    ),
    # Encoder 4/4; decoder 6/6 with cross attention, whose k and v read the encoder's output: one site for all blocks, which
    # cannot fold because the encoder's output is an output of the model too. "wo" of every block is asked for in float32.
    "t5": Family(
        hf("T5", "ForConditionalGeneration", **T5),
        17, 16, TIED | {"*.wo": "the model asks"}, lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()},
    ),
    "t5-gated": Family(
        hf("T5", "ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"), 17, 16, TIED | {"*.wo": "the model asks"},
        lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()},
    ),
    "bart": Family(  # post-norm and GELU: the three v alone, and cross attention's k and v are one site
        hf(
            "Bart", "ForConditionalGeneration", vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
            max_position_embeddings=64, decoder_start_token_id=1,
        ),
        21, 6, TIED, lambda: {"input_ids": tokens(), "decoder_input_ids": tokens()},
    ),
    "whisper": Family(  # the same with GELU: 4/3 and 6/5
        hf(
            "Whisper", "ForConditionalGeneration", vocab_size=VOCAB, d_model=WIDTH,
            encoder_layers=LAYERS, decoder_layers=LAYERS,
            encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
            num_mel_bins=8, max_source_positions=8, max_target_positions=32, decoder_start_token_id=1,
        ),
        21, 16, {"proj_out": "its weight is tied"}, lambda: {"input_features": normal(2, 8, 16), "decoder_input_ids": tokens()},
    ),
    # The attention of these two is one module that reads weights directly, so only the MLP's linears count.
    "encoder-pre-norm": Family(partial(encoder, True), 4, 4, {}, lambda: normal(2, TOKENS, WIDTH)),
    "encoder-post-norm": Family(partial(encoder, False), 4, 2, {}, lambda: normal(2, TOKENS, WIDTH)),
    "relu-mlp": Family(relu_mlp, 2, 1, {"4": "output head"}, lambda: normal(2, TOKENS, 16)),
    # A block: one site for the router and all experts, and one for each expert's last linear.
    "moe": Family(MoELM, 10, 10, {"*.chooser": "router", "head": "output head"}),
    "shared-block": Family(partial(NanoGPT, shared=True), 4, 3, TIED),
    "squared-relu": Family(partial(NanoGPT, activation=SquaredReLU), 8, 8, TIED),
}  # fmt: skip

FAMILIES = CORE | VARIED
