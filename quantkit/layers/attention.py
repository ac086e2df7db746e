"""Attention in fewer bits, as a simulation: what ``scaled_dot_product_attention`` reads is rounded just before the call.

Which modules call it is seen in a run on a small batch: of the modules that are running, the innermost one owns the call. It
gets an :class:`AttentionQuantizer` as a child, and a ``forward`` that hands its calls over to that.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantkit.core.errors import CalibrationError, ModelError
from quantkit.core.numerics import absmax_scale, decode, encode, encode_asymmetric, poison, range_scale
from quantkit.core.progress import Progress, tracked
from quantkit.core.scheme import FLOAT, Scheme
from quantkit.model.modules import applied_but_float32, call, evaluating

CHILD = "attention_quantizer"
"""How an :class:`AttentionQuantizer` is registered in the module whose attention it rounds."""
MAX_SIZE = 2**16
STEPS = 255
"""Of the grid from 0 to 1 that probabilities are rounded to."""


LABELS = {"query": "key_label", "key": "key_label", "value": "value_label"}
"""Queries and keys are multiplied channel by channel, and have the same clusters."""


def parts_of(scheme: Scheme) -> list[str]:
    """What a scheme rounds."""
    return (["query"] if scheme.attention_bits != FLOAT else []) + (["key", "value"] if scheme.kv_bits != FLOAT else [])


@dataclass(frozen=True)
class Heads:
    """The sizes of a call: query heads, different heads of keys and values, and channels of a key and of a value.

    Grouped-query attention hands over each head of keys and values once, or repeated; they count once.
    """

    queries: int
    keys: int
    width: int
    value_width: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        count = count_heads(key)
        repeats = 1
        if count == count_heads(query) == count_heads(value):
            divisors = (r for r in range(count, 0, -1) if count % r == 0)
            repeats = next(r for r in divisors if _repeats(key, r) and _repeats(value, r))
        return cls(count_heads(query), count // repeats, key.shape[-1], value.shape[-1])

    def size(self, what: str) -> tuple[int, int]:
        """Heads and channels of the ``"query"``, ``"key"`` or ``"value"``, and of their labels."""
        width = self.value_width if what in ("value", "value_label") else self.width
        return self.queries if what == "query" else self.keys, width

    @property
    def fault(self) -> str | None:
        """What makes no sense about them."""
        if not all(1 <= size <= MAX_SIZE for size in vars(self).values()):
            return f"sizes go from 1 to {MAX_SIZE}"
        return f"{self.queries} query heads share {self.keys} of keys" if self.queries % self.keys else None


def count_heads(x: Tensor) -> int:
    """Of ``[..., H, L, D]``; a tensor of up to three dimensions has one."""
    return x.shape[-3] if x.dim() > 3 else 1


def _repeats(x: Tensor, times: int) -> bool:
    """Whether the heads of ``x`` are ``times`` copies each."""
    if times == 1:
        return True
    groups = x.unflatten(-3, (-1, times))
    return torch.equal(groups, groups[..., :1, :, :].expand_as(groups))


class AttentionQuantizer(nn.Module):
    """Stands in for ``scaled_dot_product_attention``: rounds what it reads, and in a scheme with ``attention_bits`` its
    probabilities.

    Static schemes have a scale for each head and cluster of its channels, dynamic ones for each token besides.

    Args:
        scheme: number formats; only what is about attention counts, and how activations get their scales.
        heads: sizes of the calls.
        clusters: at most so many in each head.
        device: of the buffers.

    Buffers:
        key_label, value_label: ``[H, D]`` int64, the cluster of each channel, if there is more than one.
        query_range, key_range, value_range: ``[2, H, C]`` float32, least and largest value, if the scheme is static.
    """

    def __init__(self, scheme: Scheme, heads: Heads, clusters: int = 1, device: Any = None) -> None:
        super().__init__()
        self.scheme, self.heads, self.clusters = scheme, heads, clusters
        for what in parts_of(scheme):
            label = LABELS[what]
            if clusters > 1:
                self.register_buffer(label, torch.zeros(heads.size(label), dtype=torch.int64, device=device))
            if scheme.is_static:
                self.register_buffer(f"{what}_range", torch.zeros(2, heads.size(what)[0], clusters, device=device))

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
        """As :func:`torch.nn.functional.scaled_dot_product_attention`. What is not finite comes out as NaN, and so does every
        result that reads it."""
        query, key, value = self.rounded("query", query), self.rounded("key", key), self.rounded("value", value)
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if self.scheme.attention_bits == FLOAT:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)
        return attention(query, key, value, attn_mask, dropout_p, **options)

    def rounded(self, what: str, x: Tensor) -> Tensor:
        """``x [..., H, L, D]``, the ``"query"``, ``"key"`` or ``"value"`` of a call, on its grid and in its dtype.

        Raises:
            ModelError: it has other heads than this quantizer was made for.
        """
        scheme, sizes = self.scheme, self.heads
        bits = scheme.attention_bits if what == "query" else scheme.kv_bits
        if bits == FLOAT:
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
        return through(round_heads, x, label, ends, self.clusters, bits, scheme.symmetric)

    def _apply(self, fn: Any, recurse: bool = True) -> AttentionQuantizer:
        applied_but_float32(self, fn, self._buffers.keys())
        return self

    def extra_repr(self) -> str:
        return f"scheme={self.scheme.name}, heads={self.heads.queries}/{self.heads.keys}, clusters={self.clusters}"


# ---- what it computes


def through(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """``function(x, *rest)``, through which gradients pass as if nothing were rounded."""
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _StraightThrough.apply(x, function, *rest)
        return y
    return function(x, *rest)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., Tensor], *rest: Any) -> Tensor:
        ctx.rest = len(rest)
        return function(x, *rest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, *[None] * ctx.rest


def round_heads(x: Tensor, label: Tensor | None, ends: Tensor | None, clusters: int, bits: int, symmetric: bool) -> Tensor:
    """``x`` on the grid of each cluster of channels of each head, in its dtype; NaN where it is not finite.

    Args:
        x: ``[..., H, L, D]`` (without H, there is one head), float.
        label: ``[H, D]`` int64, or None for one cluster.
        ends: ``[2, H, C]`` float32, the range of each cluster; None for that of each token.
        clusters: C.
        bits, symmetric: number format.
    """
    heads = (x if x.dim() > 3 else x.unsqueeze(-3)).float()
    index = None if label is None else label[:, None]
    low, high = cluster_ends(heads, index, clusters) if ends is None else ends[:, :, None]
    if index is not None:  # from clusters to their channels
        low, high = (end.gather(-1, index.expand(*end.shape[:-1], -1)) for end in (low, high))
    if symmetric:
        absmax = torch.maximum(-low, high)
        y = decode(encode(heads, absmax, bits), absmax_scale(absmax, bits))
    else:
        scale, zero = range_scale(low, high, bits)
        y = decode(encode_asymmetric(heads, scale, zero, bits), scale, zero)
    return (y + poison(heads)).reshape(x.shape).to(x.dtype)


def cluster_ends(x: Tensor, index: Tensor | None, clusters: int) -> tuple[Tensor, Tensor]:
    """Least and largest value ``[..., H, L, C]`` of each cluster of the channels of ``x [..., H, L, D]``, 0 among them."""
    parts = [x] if index is None else [torch.where(index == c, x, 0.0) for c in range(clusters)]
    ends = [part.aminmax(dim=-1) for part in parts]
    return torch.stack([end.min for end in ends], -1).clamp_max(0), torch.stack([end.max for end in ends], -1).clamp_min(0)


def attention(
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
    """``scaled_dot_product_attention`` step by step, in float32 at least, with probabilities on a grid of 255 steps.

    Takes what torch's own takes. A query that may see no key gets zeros.
    """
    dtype = query.dtype
    query, key, value = (t if dtype == torch.float64 else t.float() for t in (query, key, value))
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if boolean else scores + attn_mask.to(scores)
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    weights = through(round_probabilities, weights)
    return (F.dropout(weights, dropout_p) @ value).to(dtype)


def round_probabilities(weights: Tensor) -> Tensor:
    """To multiples of 1/255, half to even."""
    return torch.round(weights * STEPS) / STEPS


# ---- whose calls


class _Calls(TorchFunctionMode):
    """Inside, ``answer`` is called in place of ``scaled_dot_product_attention``, but not from within an answer."""

    answering = threading.local()

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            raise ModelError(
                "nn.MultiheadAttention keeps its attention to itself, so that it cannot be quantized: leave out kv_bits and "
                "attention_bits"
            )
        if func is not F.scaled_dot_product_attention or getattr(self.answering, "now", False):
            return func(*args, **(kwargs or {}))
        self.answering.now = True  # modules within modules may be owners, and the innermost one answers alone
        try:
            return self.answer(*args, **(kwargs or {}))
        finally:
            self.answering.now = False


@contextmanager
def watching(model: nn.Module, see: Callable[[str, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, ``see(name, query, key, value)`` is told of each call in ``model``, with the module that owns it."""
    names, running = {module: name for name, module in model.named_modules()}, list[str]()

    def answer(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        see(running[-1], query, key, value)
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def enter(module: nn.Module, args: Any) -> None:
        running.append(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(_Calls(answer))
        yield


def find_attention(model: nn.Module, batch: Any) -> dict[str, Heads]:
    """Name -> sizes, of each module of ``model`` that calls ``scaled_dot_product_attention`` on ``batch``.

    Raises:
        ModelError: none does, or one does so with different sizes.
    """
    found: dict[str, Heads] = {}

    def see(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        heads = Heads.of(query, key, value)
        known = found.setdefault(name, heads)
        if replace(known, keys=heads.keys) != heads or heads.fault:
            why = heads.fault or "its calls differ in size"
            raise ModelError(
                f"attention of {name or type(model).__name__!r} cannot be quantized: {why} (query {list(query.shape)}, key "
                f"{list(key.shape)}, value {list(value.shape)}); leave out kv_bits and attention_bits"
            )
        found[name] = replace(heads, keys=math.lcm(known.keys, heads.keys))  # heads may be equal by chance, but not longer

    with evaluating(model), watching(model, see):
        call(model, batch)
    if not found:
        raise ModelError(
            f"{type(model).__name__} makes no call of torch.nn.functional.scaled_dot_product_attention that could be seen, so "
            "its attention cannot be quantized: load a transformers model with attn_implementation='sdpa', call that function "
            "in a module of your own, or leave out kv_bits and attention_bits"
        )
    return found


# ---- attaching


def calibrated(
    model: nn.Module,
    found: Mapping[str, Heads],
    scheme: Scheme,
    batches: Iterable[Any],
    label: Callable[[Tensor, Tensor, bool, str], Tensor] | None,
    *,
    progress: Progress = None,
) -> dict[str, AttentionQuantizer]:
    """A quantizer for each module that calls attention, from a pass over ``batches`` where it needs one.

    Args:
        model: as it will run, but for its attention; only watched.
        found: from :func:`find_attention`.
        scheme: number formats.
        batches: calibration data.
        label: clusters of a head, see :class:`quantkit.calibrators.HeadClusters`; None for none.
        progress: see :mod:`quantkit.core.progress`.

    Raises:
        CalibrationError: a module was not called, or read what is not finite, or another one is called.
    """
    seen: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def see(name: str, *tensors: Tensor) -> None:
        if name not in found:
            raise CalibrationError(
                f"attention of {name!r} is called in the calibration data and was not in its first batch: put one that reaches "
                "all of the model first"
            )
        for what, x in zip(("query", "key", "value"), tensors, strict=True):
            count, _ = found[name].size(what)
            if not x.numel() or count_heads(x) % count:
                continue
            heads = (x if x.dim() > 3 else x.unsqueeze(-3)).float()
            rows = heads.unflatten(-3, (count, -1)).movedim(-4, 0).flatten(1, -2)  # [H, tokens, D]
            ends = rows.aminmax(dim=1)
            low, high = seen.get((name, what), ends)
            seen[name, what] = torch.minimum(low, ends.min), torch.maximum(high, ends.max)

    if label is not None or scheme.is_static:
        with evaluating(model), watching(model, see):
            for batch in tracked(batches, "calibrating attention", progress, "batch"):
                call(model, batch)
    return {name: _calibrated(name, heads, scheme, seen, label) for name, heads in found.items()}


def _calibrated(
    name: str,
    heads: Heads,
    scheme: Scheme,
    seen: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
    label: Callable[[Tensor, Tensor, bool, str], Tensor] | None,
) -> AttentionQuantizer:
    if label is None and not scheme.is_static:
        return AttentionQuantizer(scheme, heads)
    parts = parts_of(scheme)
    for what in parts:
        if (name, what) not in seen:
            raise CalibrationError(f"no token of the calibration data reached the {what} of attention in {name!r}")
        if not bool((seen[name, what][1] - seen[name, what][0]).isfinite().all()):
            raise CalibrationError(f"calibration puts NaN, Inf or too wide a range into the {what} of attention in {name!r}")
    labels: dict[str, Tensor] = {}
    for which in dict.fromkeys(LABELS[what] for what in parts) if label is not None else ():
        assert label is not None
        sharing = [seen[name, what] for what in parts if LABELS[what] == which]
        low = torch.stack([low.unflatten(0, (heads.keys, -1)).amin(1) for low, _ in sharing], 1)  # [H, P, D]
        high = torch.stack([high.unflatten(0, (heads.keys, -1)).amax(1) for _, high in sharing], 1)
        ends = enumerate(zip(low, high, strict=True))
        of_heads = [label(*end, scheme.symmetric, f"{name}.{which}.{head}") for head, end in ends]
        labels[which] = torch.stack(of_heads).to(low.device)
    clusters = 1 + max((int(value.max()) for value in labels.values()), default=0)
    new = AttentionQuantizer(scheme, heads, clusters, seen[name, parts[0]][0].device)
    for which in labels if clusters > 1 else ():
        getattr(new, which).copy_(labels[which])
    for what in parts if scheme.is_static else ():
        low, high = seen[name, what]
        index = labels.get(LABELS[what], low.new_zeros(heads.keys, low.shape[1], dtype=torch.int64))
        index = index.repeat_interleave(len(low) // heads.keys, 0)
        ranges = getattr(new, f"{what}_range")  # of zeros, so that 0 is in every range
        ranges[0].scatter_reduce_(1, index, low, "amin")
        ranges[1].scatter_reduce_(1, index, high, "amax")
    return new


def attach_attention(model: nn.Module, quantizers: Mapping[str, AttentionQuantizer]) -> None:
    """Let ``quantizers``, by the name of their owner in ``model``, round what its attention reads from now on."""
    for name, quantizer in quantizers.items():
        owner: Any = model.get_submodule(name)
        quantizer.train(owner.training)
        owner.add_module(CHILD, quantizer)
        inner = owner.forward  # of its class, or what a library put in its place
        # Arguments of a partial are copied with the model, other than what a closure holds.
        owner.forward = functools.update_wrapper(functools.partial(_answered, owner, inner), inner)


@torch.compiler.disable(reason="quantkit simulates attention in a mode that watches every function")
def _answered(owner: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    quantizer = owner._modules.get(CHILD)
    if quantizer is None:
        return inner(*args, **kwargs)
    with _Calls(quantizer):
        return inner(*args, **kwargs)


def detach_attention(model: nn.Module) -> None:
    """Leave attention in floating point again."""
    for name in attention_quantizers(model):
        del model.get_submodule(name)._modules[CHILD]


def attention_quantizers(model: nn.Module) -> dict[str, AttentionQuantizer]:
    """By the name of the module whose attention they round."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, AttentionQuantizer)}
    return {name.rpartition(".")[0]: module for name, module in found.items()}


def explained(quantizers: Mapping[str, AttentionQuantizer]) -> list[str]:
    """For the report: which modules, and what is rounded there."""
    if not quantizers:
        return []
    first, clusters = next(iter(quantizers.values())).scheme, max(q.clusters for q in quantizers.values())
    said = [] if first.kv_bits == FLOAT else [f"keys and values in {first.kv_bits} bits"]
    said += [] if first.attention_bits == FLOAT else [f"queries in {first.attention_bits} bits, probabilities in 8"]
    said += [f"up to {clusters} clusters of channels in each head"] if clusters > 1 else []
    kinds = sorted({re.sub(r"\d+", "#", name) or "the model" for name in quantizers})
    return [f"attention of {len(quantizers)} modules ({', '.join(kinds)}): {', '.join(said)}; simulated"]
