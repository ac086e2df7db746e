"""``nn.TransformerEncoderLayer`` without its fast path, which reads the weights of linears in one float kernel.

The fast path also takes nested tensors, which ``nn.TransformerEncoder`` makes of padded ones before it calls its first layer,
whatever path that will take. So a layer without it makes them padded again, and nested for whoever comes next.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def without_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Let ``layer`` call its linears from now on, also on nested tensors."""
    layer.activation_relu_or_gelu = 0
    known = vars(layer).get("forward")
    if getattr(known, "func", None) is not _run_padded:
        # A partial, because copying a model copies the arguments of a partial with it, but not what a closure refers to.
        layer.forward = functools.update_wrapper(functools.partial(_run_padded, layer.forward), layer.forward)  # type: ignore[method-assign]


def _run_padded(inner: Any, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not src.is_nested:
        output: Tensor = inner(src, *args, **kwargs)
        return output
    lengths = [len(sequence) for sequence in src.unbind()]
    padded = src.to_padded_tensor(0.0)
    places = torch.arange(padded.shape[1], dtype=torch.int64, device=padded.device)
    mask = places >= torch.tensor(lengths, dtype=torch.int64, device=padded.device)[:, None]
    output = inner(padded, *args, **kwargs | {"src_key_padding_mask": mask})
    return torch.nested.as_nested_tensor([y[:n] for y, n in zip(output, lengths, strict=True)], layout=src.layout)
