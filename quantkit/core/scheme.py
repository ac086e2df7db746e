"""Number formats: which bits, which granularity. Frozen values; nothing about methods or hardware."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from quantkit.core.errors import SchemeError

FLOAT = 16
"""As a number of bits: what is in floating point stays there, in whatever dtype it has."""
NAME = re.compile(r"w(\d)a(\d|16)(-static)?(-asym)?(-pertensor)?(?:-norm(\d|16))?(?:-kv(\d))?(?:-attention(\d))?")


@dataclass(frozen=True)
class Scheme:
    """How weights, activations and attention are represented.

    Weights are symmetric with one scale per output channel (``weights="channel"``), or one in all
    (``"tensor"``, the naive baseline). Activations are quantized at run time with one scale per token
    (``activations="token"``), or with one scale for everything fixed at calibration (``"tensor"``). In attention it is one
    for each head (and cluster of its channels) besides.

    Anything but 8 bits of weights and activations, and anything about attention, is a simulation: values are rounded as the
    format says, but stored and multiplied as INT8, or in floating point, so nothing gets smaller or faster.

    Args:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8 for what linears read, or 16: they read it as it is, and multiply it by what the codes of their
            weights stand for.
        weights: ``"channel"`` or ``"tensor"``.
        activations: ``"token"`` (dynamic) or ``"tensor"`` (static, needs calibration data).
        symmetric: activations without (True) or with (False) a zero point.
        kv_bits: 2 to 8 for keys and values as attention reads them, which is what a cache holds, or 16.
        attention_bits: 2 to 8 for queries, and then the probabilities of attention have 8 bits, 255 steps from 0 to 1; or 16.
        norm_bits: activation bits of linears that read the output of a norm (and no other reads it); None for the same as all.

    Raises:
        SchemeError: for a combination that does not exist.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    weights: Literal["channel", "tensor"] = "channel"
    activations: Literal["token", "tensor"] = "token"
    symmetric: bool = True
    kv_bits: int = FLOAT
    attention_bits: int = FLOAT
    norm_bits: int | None = None

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "kv_bits", "attention_bits", "norm_bits"):
            bits, other = getattr(self, name), () if name == "weight_bits" else (FLOAT,)
            if bits is None and name == "norm_bits":
                continue
            if isinstance(bits, bool) or not isinstance(bits, int) or not (2 <= bits <= 8 or bits in other):
                more = ", or 16 for floating point" if other else ""
                raise SchemeError(f"Scheme({name}={bits!r}): bits are whole numbers from 2 to 8{more}")
        if self.weights not in ("channel", "tensor"):
            raise SchemeError(f"Scheme(weights={self.weights!r}): use 'channel' (one scale per output row) or 'tensor'")
        if self.activations not in ("token", "tensor"):
            raise SchemeError(
                f"Scheme(activations={self.activations!r}): use 'token' (dynamic, one scale per token) or "
                "'tensor' (static, one scale from calibration)"
            )
        rounded = (self.activation_bits, self.norm_bits or FLOAT, self.kv_bits, self.attention_bits)
        if set(rounded) == {FLOAT} and (self.is_static or not self.symmetric):
            what = "activations='tensor'" if self.is_static else "symmetric=False"
            raise SchemeError(f"Scheme(activation_bits=16, {what}): no activation is quantized; leave that out, or add kv_bits")

    @property
    def is_static(self) -> bool:
        """Whether activation scales are fixed at calibration."""
        return self.activations == "tensor"

    @property
    def is_simulation(self) -> bool:
        """Whether anything but 8 bits is asked for, or anything but linears: the hardware multiplies INT8 in any case."""
        return (self.weight_bits, self.activation_bits, self.norm_bits or 8) != (8, 8, 8) or self.quantizes_attention

    @property
    def quantizes_activations(self) -> bool:
        """Whether linears round what they read."""
        return self.activation_bits != FLOAT

    @property
    def quantizes_attention(self) -> bool:
        """Whether keys and values, or queries and probabilities, are rounded."""
        return (self.kv_bits, self.attention_bits) != (FLOAT, FLOAT)

    @property
    def takes_threshold(self) -> bool:
        """Whether columns may leave the product at run time, where they reach a threshold: a scale per token lets them."""
        return self.quantizes_activations and self.symmetric and not self.is_static

    def of_linear(self, *, behind_norm: bool = False) -> Scheme:
        """The part that is about one linear, which may read the output of a norm."""
        bits = self.norm_bits if behind_norm and self.norm_bits is not None else self.activation_bits
        plain = replace(self, activation_bits=8, kv_bits=FLOAT, attention_bits=FLOAT, norm_bits=None)
        if bits == FLOAT:
            plain = replace(plain, activations="token", symmetric=True)
        return replace(plain, activation_bits=bits)

    @property
    def name(self) -> str:
        """Short name that :meth:`parse` reads back, such as ``w8a8`` or ``w4a8-static-asym-kv4``."""
        parts = [f"w{self.weight_bits}a{self.activation_bits}"]
        parts += ["static"] if self.is_static else []
        parts += [] if self.symmetric else ["asym"]
        parts += ["pertensor"] if self.weights == "tensor" else []
        parts += [] if self.norm_bits is None else [f"norm{self.norm_bits}"]
        parts += [] if self.kv_bits == FLOAT else [f"kv{self.kv_bits}"]
        parts += [] if self.attention_bits == FLOAT else [f"attention{self.attention_bits}"]
        return "-".join(parts)

    @classmethod
    def parse(cls, scheme: str | Scheme) -> Scheme:
        """A :class:`Scheme` from itself or from a name:
        ``wXaY[-static][-asym][-pertensor][-normB][-kvB][-attentionB]``, any bits from 2 to 8, and for activations 16."""
        if isinstance(scheme, Scheme):
            return scheme
        match = NAME.fullmatch(scheme) if isinstance(scheme, str) else None
        if match is None:
            raise SchemeError(
                f"scheme={scheme!r} is not known: pass a quantkit.Scheme or a name such as 'w8a8' (dynamic per token), "
                "'w8a8-asym', 'w8a8-static', 'w8a8-static-asym', 'w4a8', 'w6a6', 'w4a16' (weights only), 'w4a16-kv4', "
                "'w4a4-static-asym-norm8-kv4-attention4'; None leaves the model in floating point"
            )
        weight, activation, static, asymmetric, per_tensor, norm, kv, attention = match.groups()
        return cls(
            weight_bits=int(weight),
            activation_bits=int(activation),
            weights="tensor" if per_tensor else "channel",
            activations="tensor" if static else "token",
            symmetric=not asymmetric,
            kv_bits=int(kv or FLOAT),
            attention_bits=int(attention or FLOAT),
            norm_bits=None if norm is None else int(norm),
        )
