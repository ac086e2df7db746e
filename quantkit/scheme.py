"""Number formats: which bits, which granularity. Frozen values; nothing about methods or hardware."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from quantkit.errors import SchemeError


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are represented.

    Weights are symmetric with one scale per output channel (``weights="channel"``), or one in all
    (``"tensor"``, the naive baseline). Activations are quantized at run time with one scale per token
    (``activations="token"``), or with one scale for everything fixed at calibration (``"tensor"``).

    Args:
        weight_bits, activation_bits: 2 to 8. Anything but 8 is a simulation: the codes are those of
            the smaller integer, but they are stored and multiplied as INT8, so nothing gets smaller or faster.
        weights: ``"channel"`` or ``"tensor"``.
        activations: ``"token"`` (dynamic) or ``"tensor"`` (static, needs calibration data).
        symmetric: activations without (True) or with (False) a zero point.

    Raises:
        SchemeError: for a combination that does not exist.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    weights: Literal["channel", "tensor"] = "channel"
    activations: Literal["token", "tensor"] = "token"
    symmetric: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
                raise SchemeError(f"Scheme({name}={bits!r}): bits are whole numbers from 2 to 8")
        if self.weights not in ("channel", "tensor"):
            raise SchemeError(f"Scheme(weights={self.weights!r}): use 'channel' (one scale per output row) or 'tensor'")
        if self.activations not in ("token", "tensor"):
            raise SchemeError(
                f"Scheme(activations={self.activations!r}): use 'token' (dynamic, one scale per token) or "
                "'tensor' (static, one scale from calibration)"
            )

    @property
    def is_static(self) -> bool:
        """Whether activation scales are fixed at calibration."""
        return self.activations == "tensor"

    @property
    def is_simulation(self) -> bool:
        """Whether the codes use fewer than the 8 bits that the hardware multiplies."""
        return (self.weight_bits, self.activation_bits) != (8, 8)

    @property
    def name(self) -> str:
        """Short name that :meth:`parse` reads back, such as ``w8a8`` or ``w4a8-static-asym``."""
        parts = [f"w{self.weight_bits}a{self.activation_bits}"]
        parts += ["static"] if self.is_static else []
        parts += [] if self.symmetric else ["asym"]
        parts += ["pertensor"] if self.weights == "tensor" else []
        return "-".join(parts)

    @classmethod
    def parse(cls, scheme: str | Scheme) -> Scheme:
        """A :class:`Scheme` from itself or from a name: ``w8a8[-static][-asym][-pertensor]``, any bits from 2 to 8."""
        if isinstance(scheme, Scheme):
            return scheme
        match = re.fullmatch(r"w(\d)a(\d)(-static)?(-asym)?(-pertensor)?", scheme) if isinstance(scheme, str) else None
        if match is None:
            raise SchemeError(
                f"scheme={scheme!r} is not known: pass a quantkit.Scheme or a name such as 'w8a8' (dynamic per token), "
                "'w8a8-asym', 'w8a8-static', 'w8a8-static-asym', 'w4a8', 'w6a6'; None leaves the model in floating point"
            )
        weight, activation, static, asymmetric, per_tensor = match.groups()
        return cls(
            weight_bits=int(weight),
            activation_bits=int(activation),
            weights="tensor" if per_tensor else "channel",
            activations="tensor" if static else "token",
            symmetric=not asymmetric,
        )
