"""The calibration data of one run: what a user passed, a look at its first batch, and a small piece of that to probe with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from quantkit.calibration.data import calibration_batches, peek, probe_batch
from quantkit.calibration.statistics import Range, Statistic, TokenSample
from quantkit.calibrators import Stage
from quantkit.core.errors import CalibrationError
from quantkit.model.modules import weight_of
from quantkit.pipeline.check import Request

ENOUGH = 64
"""From so many batches on, the last one is held out from calibration."""


@dataclass
class Data:
    """The data, and what is to be collected from it.

    Attributes:
        batches: all of it.
        first: its first batch.
        piece: a few tokens of the first batch.
        written: names of linears whose weights were another when the model had run for the first time.
        held: a batch that no calibrator sees, where there are :data:`ENOUGH` to spare one.
        given: whether a user passed it; otherwise the model sampled it, or a few random tokens were enough.
        kinds: statistics to collect for each site; none where nothing has to be known.
        digest: of the tensors of all batches that were observed.
    """

    batches: Iterable[Any]
    first: Any
    piece: Any
    given: bool
    kinds: tuple[type[Statistic], ...]
    digest: Any = field(default_factory=hashlib.sha256)
    held: Any = None
    written: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        request: Request,
        calibration: Any,
        tokenizer: Any,
        linears: Mapping[str, nn.Module],
    ) -> Data:
        """Raises CalibrationError for data of the wrong kind, for none where it is needed, or a generator needed twice."""
        before = _versions(linears)
        kinds = [kind for c in request.calibrators for kind in c.statistics] + ([Range] if request.is_static else [])
        batches = calibration_batches(
            model, calibration, tokenizer=tokenizer, needed=bool(kinds), seed=request.seed, progress=request.progress
        )
        first, batches = peek(batches)
        if request.scheme is not None and (kinds or calibration is not None):
            kinds.append(TokenSample)  # for the report
        data = cls(batches, first, None, calibration is not None, tuple(dict.fromkeys(kinds)))
        if isinstance(batches, (list, tuple)) and len(batches) >= ENOUGH:
            *data.batches, data.held = batches
        if request.is_static and any(c.stage == Stage.ROTATE for c in request.calibrators):
            data.check_walks_again("a static scale behind a rotation")
        data.piece = probe_batch(model, first)
        data.written = frozenset(name for name, _ in before.items() ^ _versions(linears).items())
        return data

    @property
    def source(self) -> str:
        """Where it came from, for the report."""
        return "given" if self.given else "sampled from the model" if self.kinds else "not needed"

    def check_walks_again(self, what: str) -> None:
        """Raises CalibrationError if the data can be walked through only once, and ``what`` needs it again."""
        if iter(self.batches) is self.batches:
            raise CalibrationError(
                f"{what} reads the calibration data more than once: pass a list or a DataLoader, not a generator"
            )


def _versions(linears: Mapping[str, nn.Module]) -> dict[str, int]:
    """How often each weight has been written to, as autograd counts it."""
    weights = {name: weight_of(linear) for name, linear in linears.items()}
    return {name: weight._version for name, weight in weights.items() if not weight.is_inference()}
