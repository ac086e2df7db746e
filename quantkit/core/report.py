"""The report: what happened to every weight matrix of a model, and why, as data that is saved with the checkpoint.

A model carries its report as an attribute, from the end of :func:`quantkit.quantize` on and again after :func:`quantkit.load`.
Whoever has to do something with every such model, as the bridge to transformers has, adds a listener.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from torch import nn

from quantkit.core.errors import ModelError
from quantkit.core.scheme import Scheme
from quantkit.core.text import printable

T = TypeVar("T")

ATTRIBUTE = "_quantkit_record"
LISTENERS: list[Callable[[nn.Module], None]] = []
"""Called, in order, with every model that gets a report."""


@dataclass
class LayerRecord:
    """What happened to one linear, or to another weight matrix.

    Attributes:
        name: of the linear in the model; of another matrix, that of its parameter, without ``".weight"``.
        kind: ``"int8"``, or ``"float"`` where it stays in floating point.
        site: name of the site it belongs to, if any: the linears that read the same activation.
        folded_into: name of the producer of its activation that took the scale over, if any.
        at_run_time: what is done to its activation at run time, such as ``["pre_scale"]``.
        sqnr_db: signal to quantization noise ratio, in dB, of its output on the sampled calibration tokens, in the number
            format of the scheme.
        reason: why it stays in floating point, or why nothing could be folded.
        notes: what calibrators said about its site, such as ``{"alpha": 0.55}``.
        weights: how many it has, without those that an earlier record shares with it; 0 in reports of older versions.
    """

    name: str
    kind: str
    site: str | None = None
    folded_into: str | None = None
    at_run_time: list[str] = field(default_factory=list)
    sqnr_db: float | None = None
    reason: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    weights: int = 0

    @property
    def reason_in_short(self) -> str:
        """The first words of the reason, under which the summary adds records up."""
        return re.split("[:;,]", self.reason)[0] or "floating point"


@dataclass
class Verification:
    """How far the outputs of the converted model are from those of the float model, on a piece of the calibration data.

    Attributes:
        sqnr_db: signal to noise ratio in dB, the lowest of all floating-point outputs; None where there is none to compare.
        expected_db: what the errors of the layers by themselves lead to expect; None where these were not measured, and where
            attention is rounded too, whose errors are not.
        held_out: whether no calibrator has seen the piece.
        kl: mean KL(float || converted) of the next token in nats, where the output is logits of a vocabulary.
        top1: share of positions with the same most likely token.
    """

    sqnr_db: float | None
    expected_db: float | None
    held_out: bool
    kl: float | None = None
    top1: float | None = None

    def __str__(self) -> str:
        if self.sqnr_db is None:
            return "the model runs, and has no floating-point output to compare"
        text = f"the outputs of the model are at {self.sqnr_db:.1f} dB"
        if self.expected_db is not None:
            text += f" (its layers lead to expect {self.expected_db:.1f} dB)"
        if self.kl is not None and self.top1 is not None:
            text += f", KL {self.kl:.4f}, the same favourite at {self.top1:.1%} of positions"
        return text + (", on data held out from calibration" if self.held_out else "")


@dataclass
class Report:
    """What :func:`quantkit.quantize` did.

    Attributes:
        method: names of the calibrators, in order.
        scheme: name of the number format, None for a model left in floating point.
        seed: seed of everything that was drawn at random.
        calibration: where the calibration data came from, in words.
        equivalence: relative error of the output of the folded model, still in floating point, against that of the original
            model, on one batch; 0 where nothing could be folded, None where nothing was to be.
        layers: one record for each linear.
        rewrites: what was done to the model as a whole, besides its linears: a rotation before, and attention after them.
        recipe: all arguments that decided the result, for :meth:`quantkit.Recipe.from_dict`; None in reports of older versions,
            and where a layer was chosen by its class.
        calibration_sha256: SHA-256 of the tensors of the calibration data, in order; None where none was read.
        verification: of the converted model as a whole; None where it was not run.
        others: one record for each weight matrix that is in no linear, such as an embedding; all stay in floating point.
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
    verification: Verification | None = None
    others: list[LayerRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report in plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report that :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError: it is none; the message says what is wrong.
            SchemeError: its scheme is none.
        """
        lists = {"layers": data["layers"], "others": data.get("others", [])}
        records = {name: [_read(LayerRecord, record) for record in found] for name, found in lists.items()}
        verified = data.get("verification")
        verification = None if verified is None else _read(Verification, verified)
        made = _read(cls, {**data, **records, "verification": verification})
        if made.scheme is not None:
            Scheme.parse(made.scheme)
        return made

    def share(self, records: Iterable[LayerRecord]) -> float:
        """What part of all weights these records have, from 0 to 1; 0 where a report of an older version did not count them."""
        return sum(r.weights for r in records) / max(1, sum(r.weights for r in (*self.layers, *self.others)))

    def floats(self) -> dict[str, list[LayerRecord]]:
        """All records in floating point by their reason in short, those with the most weights first."""
        groups: dict[str, list[LayerRecord]] = {}
        for record in (*self.layers, *self.others):
            if record.kind != "int8":
                groups.setdefault(record.reason_in_short, []).append(record)
        return dict(sorted(groups.items(), key=lambda group: -self.share(group[1])))

    @property
    def summary(self) -> str:
        """The report without its layers, in a few lines."""
        int8 = [r for r in self.layers if r.kind == "int8"]
        folded = sum(r.folded_into is not None for r in self.layers)
        online = sum(bool(r.at_run_time) for r in int8)
        head = (
            f"{' + '.join(self.method)} -> {self.scheme or 'floating point'}: {len(int8)} of {len(self.layers)} linears in INT8"
        )
        if self.share(int8):
            rest = ", ".join(
                f"{why} {percent(part)}" for why, records in self.floats().items() if (part := self.share(records))
            )
            head += f" ({percent(self.share(int8))} of the weights{rest and f'; {rest}'})"
        lines = [head]
        lines.append(
            f"  {folded} read a folded scale, {online} rewrite their input at run time, calibration: {self.calibration}"
        )
        if self.equivalence is not None:
            lines.append(f"  folding changed the float model by {self.equivalence:.1e} (relative)")
        lines += [f"  {what}" for what in self.rewrites]
        return printable("\n".join(lines + ([] if self.verification is None else [f"  {self.verification}"])))

    def __str__(self) -> str:
        head = f"{'layer':<52} {'kind':<6} {'weights':>7} {'SQNR':>8}  what happened"
        rows = [self.summary, "", head, "-" * len(head)]
        for r in (*self.layers, *self.others):
            share = percent(self.share([r])) if r.weights else ""
            sqnr = "" if r.sqnr_db is None else f"{r.sqnr_db:.1f} dB"
            said = [f"folded into {r.folded_into}"] if r.folded_into else []
            said += [f"{' and '.join(r.at_run_time)} at run time"] if r.at_run_time else []
            said += [r.reason] if r.reason else []
            said += [f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in r.notes.items()]
            rows.append(f"{r.name:<52} {r.kind:<6} {share:>7} {sqnr:>8}  {'; '.join(said)}")
        return printable("\n".join(rows))


def _read(kind: type[T], data: Mapping[str, Any]) -> T:
    """An instance of a dataclass of this file from plain JSON, each value of the type that its field has."""
    made = kind(**data)
    for name, choices in _fields(cast("Any", kind)).items():
        value = getattr(made, name)
        if not any(_is_a(value, choice) for choice in choices):
            raise TypeError(f"{name} is {value!r}")
    return made


@functools.cache
def _fields(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """The types that each field of a dataclass may have."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}


def _is_a(value: Any, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is not list or all(_is_a(item, inner[0]) for item in value))


def percent(share: float) -> str:
    """A share of something as a text for people; what rounds to nothing, or to all, is said to be less."""
    return "< 1 %" if 0 < share < 0.005 else "> 99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def report(model: nn.Module) -> Report:
    """The :class:`Report` of a model that quantkit has quantized or loaded; ``print`` it, or read its ``layers``.

    Raises:
        ModelError: quantkit has not touched this model.
    """
    record = getattr(model, ATTRIBUTE, None)
    if not isinstance(record, Report):
        raise ModelError("quantkit has not quantized this model: call quantkit.quantize(model) or quantkit.load(path) first")
    return record


def attach(model: nn.Module, record: Report) -> None:
    """Make ``record`` the report of ``model``, and call the listeners with it."""
    setattr(model, ATTRIBUTE, record)
    for listener in LISTENERS:
        listener(model)


def detach(model: nn.Module) -> None:
    """Take the report of a model away, if it has one: it is in floating point again."""
    if hasattr(model, ATTRIBUTE):
        delattr(model, ATTRIBUTE)


def has_report(model: nn.Module) -> bool:
    """Whether quantkit has quantized or loaded a model."""
    return hasattr(model, ATTRIBUTE)
