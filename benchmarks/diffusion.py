"""Seven models of diffusers, tiny and random, for ``architectures.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TEXT = 32
"""Channels of what stands for a text."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


TIME = torch.tensor([7])

# Name of a class -> its configuration, and what it is called on.
MODELS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "UNet2DConditionModel": (
        {
            "sample_size": 16, "block_out_channels": (32, 64), "norm_num_groups": 8, "cross_attention_dim": TEXT,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1, "attention_head_dim": 8,
        },
        lambda: {"sample": normal(1, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": normal(1, 8, TEXT)},
    ),
    "AutoencoderKL": (
        {"block_out_channels": (32, 64), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda: {"sample": normal(1, 3, 32, 32)},
    ),
    "DiTTransformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 16, "out_channels": 8, "num_layers": 2, "sample_size": 16,
         "num_embeds_ada_norm": 100},
        lambda: {"hidden_states": normal(1, 4, 16, 16), "timestep": TIME, "class_labels": torch.tensor([3])},
    ),
    "PixArtTransformer2DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16, "cross_attention_dim": 64,
         "caption_channels": TEXT, "use_additional_conditions": False},
        lambda: {"hidden_states": normal(1, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": normal(1, 8, TEXT),
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3Transformer2DModel": (
        {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 4, "joint_attention_dim": TEXT, "caption_projection_dim": 64, "pooled_projection_dim": 48,
         "pos_embed_max_size": 16},
        lambda: {"hidden_states": normal(1, 4, 16, 16), "timestep": TIME, "encoder_hidden_states": normal(1, 8, TEXT),
                 "pooled_projections": normal(1, 48)},
    ),
    "FluxTransformer2DModel": (
        {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "joint_attention_dim": TEXT, "pooled_projection_dim": 48, "axes_dims_rope": (4, 6, 6)},
        lambda: {"hidden_states": normal(1, 16, 16), "timestep": torch.tensor([0.5]), "pooled_projections": normal(1, 48),
                 "encoder_hidden_states": normal(1, 8, TEXT), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)},
    ),
    "WanTransformer3DModel": (
        {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": TEXT,
         "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_max_seq_len": 32},
        lambda: {"hidden_states": normal(1, 4, 2, 8, 8), "timestep": TIME, "encoder_hidden_states": normal(1, 8, TEXT)},
    ),
}  # fmt: skip
