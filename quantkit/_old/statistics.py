"""``quantkit.statistics`` of version 0.1."""

from quantkit.core.moved import moved

__getattr__ = moved("quantkit.statistics", "quantkit.calibration.statistics")
