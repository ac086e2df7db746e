"""The module that rounds what attention reads, and how it is put into a model and taken out again.

A model calls ``torch.nn.functional.scaled_dot_product_attention`` somewhere inside of one of its modules, the *owner* of the
call (:mod:`quantkit.discovery.attention` finds the owners). Attaching gives the owner one more child, an
:class:`AttentionQuantizer`, and replaces its ``forward`` by one that hands attention calls over to that child. The child is an
ordinary module: it moves with the model, and its buffers are in the model's ``state_dict``. Detaching removes it, and the owner
    computes as before.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.core.errors import ModelError
from quantkit.core.formats import Format, Quantized
from quantkit.core.heads import HeadSizes, count_heads
from quantkit.core.scheme import Scheme
from quantkit.core.tracing import in_memory
from quantkit.model.modules import applied_but_float32
from quantkit.ops.attention import attention, round_heads, through

CHILD = "attention_quantizer"
"""The name under which an :class:`AttentionQuantizer` is registered in the module whose attention it rounds."""

LABELS = {"query": "key_label", "key": "key_label", "value": "value_label"}
"""The buffer that holds the cluster of each channel. Queries and keys share one: they are multiplied channel by channel."""


def format_of(scheme: Scheme, what: str) -> Format:
    """The number format of the ``"query"``, ``"key"`` or ``"value"`` of a call."""
    return scheme.queries if what == "query" else scheme.kv


def parts_of(scheme: Scheme) -> list[str]:
    """Which of ``"query"``, ``"key"`` and ``"value"`` a scheme rounds."""
    return [what for what in LABELS if isinstance(format_of(scheme, what), Quantized)]


class AttentionQuantizer(nn.Module):
    """Is called in place of ``scaled_dot_product_attention``, and rounds what that reads.

    A scheme that quantizes ``kv`` rounds keys and values; one that quantizes ``queries`` rounds these and, to 8 bits,
    probabilities.
    A static scheme has one scale for each head and cluster of channels, fixed in calibration. A dynamic one has a scale for
    each token in each of these.

    Args:
        scheme: the number formats. Only the bits of attention, and whether activations are static and symmetric, count here.
        heads: the sizes of the calls.
        clusters: the number of clusters C into which the channels of each head are divided, at most.
        device: of the buffers.

    Buffers:
        key_label, value_label: ``[H, D]`` int64, the cluster of each channel, if there is more than one.
        query_range, key_range, value_range: ``[2, H, C]`` float32, the least and the largest value, if the scheme is static.
    """

    def __init__(self, scheme: Scheme, heads: HeadSizes, clusters: int = 1, device: Any = None) -> None:
        super().__init__()
        self.scheme, self.heads, self.clusters = scheme, heads, clusters
        for what in parts_of(scheme):
            label = LABELS[what]
            if clusters > 1:
                self.register_buffer(label, torch.zeros(heads.size(label), dtype=torch.int64, device=device))
            if scheme.is_static:
                self.register_buffer(
                    f"{what}_range", torch.zeros(2, heads.size(what)[0], clusters, device=device, dtype=torch.float32)
                )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Takes and returns what :func:`torch.nn.functional.scaled_dot_product_attention` does.

        An element that is NaN or infinite is rounded to NaN, and makes every result that reads it NaN.
        """
        query, key, value = self.rounded("query", query), self.rounded("key", key), self.rounded("value", value)
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if not isinstance(self.scheme.queries, Quantized):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
        return attention(query, key, value, attn_mask, dropout_p, **options)

    def rounded(self, what: str, x: Tensor) -> Tensor:
        """One tensor of a call, rounded as the scheme says, in its own dtype.

        Args:
            what: ``"query"``, ``"key"`` or ``"value"``.
            x: ``[..., H, L, D]``, or ``[..., L, D]`` for a single head.

        Raises:
            ModelError: ``x`` has another number of heads, or of channels, than this quantizer was made for.
        """
        scheme, sizes = self.scheme, self.heads
        rounding = format_of(scheme, what)
        if not isinstance(rounding, Quantized):
            return x
        own, width = sizes.size(what)
        if count_heads(x) % own or x.shape[-1] != width:
            raise ModelError(
                f"attention is called with a {what} of {count_heads(x)} heads of {x.shape[-1]} channels, and was quantized "
                f"with {own} heads of {width}: all its calls must have the same sizes"
            )
        label: Tensor | None = getattr(self, LABELS[what], None)
        ends: Tensor | None = getattr(self, f"{what}_range", None)
        label = None if label is None else label.repeat_interleave(count_heads(x) // len(label), 0)
        ends = None if ends is None else ends.repeat_interleave(count_heads(x) // own, 1)
        return through(round_heads, x, label, ends, self.clusters, rounding.number.bits, rounding.number.symmetric)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, strict: bool, *rest: Any) -> None:
        own = {name: t for name in self._buffers if isinstance(t := state.get(prefix + name), Tensor)}
        if fault := self.damage_in(own):
            rest[-1].append(f"{prefix[:-1]!r} cannot hold this state, which is damaged: {fault}")
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, *rest)

    def damage_in(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with the values of ``tensors``, named as the buffers here; None if nothing is."""
        for name, tensor in tensors.items():
            if tensor.is_meta or not in_memory(tensor):
                continue
            if name.endswith("label") and bool(((tensor < 0) | (tensor >= self.clusters)).any()):
                return f"{name} names a cluster beyond 0 to {self.clusters - 1}"
            if name.endswith("range") and not bool(tensor.isfinite().all() & (tensor[0] <= tensor[1]).all()):
                return f"{name} holds no finite least and largest values"
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> AttentionQuantizer:
        applied_but_float32(self, fn, self._buffers.keys())
        return self

    def extra_repr(self) -> str:
        return f"scheme={self.scheme.name}, heads={self.heads.queries}/{self.heads.keys}, clusters={self.clusters}"


def attach_attention(model: nn.Module, quantizers: Mapping[str, AttentionQuantizer]) -> None:
    """From now on, let ``quantizers`` round what attention in ``model`` reads.

    Args:
        model: changed in place.
        quantizers: by the name of the module that calls attention, ``""`` for the model itself.
    """
    if not quantizers:
        return
    from quantkit.layers.uncompiled import run_with_child  # imports torch._dynamo, which takes a second

    for name, quantizer in quantizers.items():
        owner: Any = model.get_submodule(name)
        quantizer.train(owner.training)
        owner.add_module(CHILD, quantizer)
        inner = owner.forward  # that of its class, or one that a library put into the instance
        # A partial, because copying a model copies the arguments of a partial with it, but not what a closure refers to.
        owner.forward = functools.update_wrapper(functools.partial(run_with_child, owner, CHILD, inner), inner)


def detach_attention(model: nn.Module) -> None:
    """Remove every :class:`AttentionQuantizer`, so that attention in ``model`` is computed in floating point again."""
    for name in attention_quantizers(model):
        del model.get_submodule(name)._modules[CHILD]


def attention_quantizers(model: nn.Module) -> dict[str, AttentionQuantizer]:
    """Every :class:`AttentionQuantizer` in ``model``, by the name of the module whose attention it rounds."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, AttentionQuantizer)}
    return {name.rpartition(".")[0]: module for name, module in found.items()}


def explained(quantizers: Mapping[str, AttentionQuantizer]) -> list[str]:
    """Lines for the report that say which modules have their attention rounded, and what is rounded there."""
    if not quantizers:
        return []
    first, clusters = next(iter(quantizers.values())).scheme, max(q.clusters for q in quantizers.values())
    said = [f"keys and values in {first.kv.number.bits} bits"] if isinstance(first.kv, Quantized) else []
    queries = first.queries
    said += [f"queries in {queries.number.bits} bits, probabilities in 8"] if isinstance(queries, Quantized) else []
    said += [f"up to {clusters} clusters of channels in each head"] if clusters > 1 else []
    kinds = sorted({re.sub(r"\d+", "#", name) or "the model" for name in quantizers})
    return [f"attention of {len(quantizers)} modules ({', '.join(kinds)}): {', '.join(said)}; simulated"]
