"""Rotating the spaces of a float model, as calibrators in ``Stage.MODEL`` decide: ask, rotate, and prove."""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from quantkit.calibrators import Stage, View
from quantkit.core.errors import EquivalenceError, MethodError
from quantkit.core.spaces import SpaceRotation
from quantkit.discovery.equivalence import outputs_of, relative_error, tolerance_for
from quantkit.pipeline.answers import answer_of, progress_of
from quantkit.pipeline.check import Request
from quantkit.pipeline.data import Data
from quantkit.pipeline.rotate import rotate


def rotate_spaces(
    model: nn.Module, request: Request, data: Data, undo: ExitStack
) -> tuple[tuple[SpaceRotation, ...], list[str]]:
    """Rotate the float model as calibrators in ``Stage.MODEL`` decide, and prove that it still computes the same.

    Returns:
        the rotations, and what was done in sentences for the report.

    Raises:
        MethodError: a calibrator finds nothing that it could rotate, or the weights do not allow it.
        EquivalenceError: the rotated model computes something else.
    """
    rotations: list[SpaceRotation] = []
    said: list[str] = []
    for calibrator in (c for c in request.calibrators if c.stage == Stage.MODEL):
        view = View(model, [], lambda: (data.piece, data.first), request.seed, progress_of(request.progress))
        what = answer_of(calibrator, view, []).rotate
        if what is None:
            continue
        wanted = outputs_of(model, data.piece)
        noise = relative_error(wanted, outputs_of(model, data.piece))
        try:
            said += rotate(model, what, undo)
        except MethodError as error:
            raise MethodError(f"{calibrator.name}: {error}") from error
        change, tolerance = relative_error(wanted, outputs_of(model, data.piece)), tolerance_for(wanted, noise, model)
        if change > tolerance:
            raise EquivalenceError(
                f"{calibrator.name} changed the model by {change:.1e} (allowed {tolerance:.1e}); it was undone. In a short "
                "format, rounding the rotated weights may be the cause: rotate in float32, and cast afterwards"
            )
        rotations.append(what)
        said.append(f"this changed the float model by {change:.1e} (relative)")
    return tuple(rotations), said
