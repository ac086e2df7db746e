"""What happened to every layer, and why, as data that saves with the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from quantkit.core.errors import ModelError

RECORD = "_quantkit_record"
LISTENERS: list[Callable[[nn.Module], None]] = []
"""Called with every model that gets a report; integrations add themselves once their library is there."""


def attach(model: nn.Module, record: Report) -> None:
    """Make ``record`` the report of ``model``."""
    setattr(model, RECORD, record)
    for listen in LISTENERS:
        listen(model)


@dataclass
class LayerRecord:
    """One linear.

    Attributes:
        name: in the model.
        kind: ``"int8"`` or ``"float"``.
        site: name of the site it belongs to, if any.
        folded_into: the producer that took the scale over, if any.
        at_run_time: what is done to its activation at run time, such as ``["pre_scale"]``.
        sqnr_db: of its output on the sampled calibration tokens, in the number format of the scheme.
        reason: why it stays in floating point, or why nothing could be folded.
        notes: what calibrators said, such as ``{"alpha": 0.55}``.
    """

    name: str
    kind: str
    site: str | None = None
    folded_into: str | None = None
    at_run_time: list[str] = field(default_factory=list)
    sqnr_db: float | None = None
    reason: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """What :func:`quantkit.quantize` did.

    Attributes:
        method: names of the calibrators, in order.
        scheme: name of the number format, None for a model left in floating point.
        seed, calibration: how to repeat it.
        calibration_sha256: of the tensors of the data, in order; None where none was read.
        equivalence: relative error of the folded float model against the original on one batch.
        layers: one record per linear.
        rewrites: what was done to the model as a whole, beside its linears: a rotation before, attention after them.
        recipe: all arguments that decided it, for :meth:`quantkit.Recipe.from_dict`; None in reports of older versions, and
            where a layer was chosen by its class.
    """

    method: list[str]
    scheme: str | None
    seed: int
    calibration: str
    equivalence: float | None = None
    layers: list[LayerRecord] = field(default_factory=list)
    rewrites: list[str] = field(default_factory=list)
    recipe: dict[str, Any] | None = None
    calibration_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        return cls(**{**data, "layers": [LayerRecord(**layer) for layer in data["layers"]]})

    @property
    def summary(self) -> str:
        """One paragraph."""
        int8 = [r for r in self.layers if r.kind == "int8"]
        folded = sum(r.folded_into is not None for r in self.layers)
        online = sum(bool(r.at_run_time) for r in int8)
        lines = [
            f"{' + '.join(self.method)} -> {self.scheme or 'floating point'}: {len(int8)} of {len(self.layers)} linears in INT8"
        ]
        lines.append(
            f"  {folded} read a folded scale, {online} rewrite their input at run time, calibration: {self.calibration}"
        )
        if self.equivalence is not None:
            lines.append(f"  folding changed the float model by {self.equivalence:.1e} (relative)")
        return "\n".join(lines + [f"  {what}" for what in self.rewrites])

    def __str__(self) -> str:
        head = f"{'layer':<52} {'kind':<6} {'SQNR':>8}  what happened"
        rows = [self.summary, "", head, "-" * len(head)]
        for r in self.layers:
            sqnr = "" if r.sqnr_db is None else f"{r.sqnr_db:.1f} dB"
            said = [f"folded into {r.folded_into}"] if r.folded_into else []
            said += [f"{' and '.join(r.at_run_time)} at run time"] if r.at_run_time else []
            said += [r.reason] if r.reason else []
            said += [f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in r.notes.items()]
            rows.append(f"{r.name:<52} {r.kind:<6} {sqnr:>8}  {'; '.join(said)}")
        return "\n".join(rows)


def report(model: nn.Module) -> Report:
    """The :class:`Report` of a model that quantkit has quantized or loaded; ``print`` it, or read its ``layers``.

    Raises:
        ModelError: quantkit has not touched this model.
    """
    record = getattr(model, RECORD, None)
    if not isinstance(record, Report):
        raise ModelError("quantkit has not quantized this model: call quantkit.quantize(model) or quantkit.load(path) first")
    return record
