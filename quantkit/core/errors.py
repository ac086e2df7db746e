"""Every error quantkit raises on purpose. Each message names the layer, the value and the way out.

QuantkitError (ValueError)
├── ModelError          the model cannot be quantized as it is (no linears, meta weights, quantized already)
├── MethodError         unknown or wrongly composed calibrators, or a plan that cannot be carried out
├── SchemeError         a number format that does not exist
├── CalibrationError    missing, empty, mistyped or non-finite calibration data
├── TargetError         an ``ignore`` or ``targets`` pattern that matches nothing
├── EquivalenceError    a transformation changed the function of the model
├── BackendError        a backend that cannot run what it was asked to run
├── CheckpointError     a checkpoint that is damaged, foreign, newer, or not safe to open
└── PluginError         an installed package that adds to quantkit cannot be imported
"""

import difflib
from collections.abc import Iterable

from quantkit.core.text import printable, shortened


class QuantkitError(ValueError):
    """Base class: ``except quantkit.QuantkitError`` catches everything quantkit raises on purpose.

    What a message quotes of a stranger's file is shown as text, and not at any length.
    """

    def __str__(self) -> str:
        return shortened(printable(super().__str__()))


class ModelError(QuantkitError):
    """The model cannot be quantized as it is."""


class MethodError(QuantkitError):
    """An unknown calibrator, calibrators in an order that makes no sense, or an answer that cannot be carried out."""


class SchemeError(QuantkitError):
    """A number format that does not exist."""


class CalibrationError(QuantkitError):
    """Calibration data is missing, empty, of the wrong type, on the wrong device or not finite."""


class TargetError(QuantkitError):
    """An ``ignore`` or ``targets`` entry matches no layer."""


class EquivalenceError(QuantkitError):
    """A transformation that should preserve the function of the model did not."""


class BackendError(QuantkitError):
    """A backend was asked for something it cannot run."""


class CheckpointError(QuantkitError):
    """A checkpoint is damaged, foreign, of another version, or not safe to open."""


class PluginError(QuantkitError):
    """An installed package that adds a method or a backend cannot be imported, or is in conflict with another one."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """What to add to a message about an unknown word that is almost a known one; nothing if it is not."""
    close = difflib.get_close_matches(word.lower(), known, 1) if isinstance(word, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""
