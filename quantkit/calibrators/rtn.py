"""Round to nearest: the baseline that every other method must beat.

Every weight becomes the nearest code on the grid of its row, which reaches to the row's largest absolute weight. That is what
the pipeline does with every linear for which no calibrator has chosen integers, so this calibrator decides nothing: its plan
is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantkit.calibration.statistics import Statistic
from quantkit.calibrators.base import Plan, Stage, View


@dataclass(frozen=True)
class RTN:
    """Round every weight to the nearest code of its row. Needs no data; every composition ends with it by default."""

    name: ClassVar[str] = "rtn"
    stage: ClassVar[Stage] = Stage.ROUND
    statistics: ClassVar[tuple[type[Statistic], ...]] = ()

    def plan(self, view: View) -> Plan:
        return Plan()  # linears without codes are rounded to nearest
