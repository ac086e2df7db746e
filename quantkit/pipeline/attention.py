"""Attention in a plan: which modules call it, and how what they read is rounded, decided before any layer is swapped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from torch import nn

from quantkit.calibration.attention import Label, calibrate_attention
from quantkit.calibrators.base import HeadClusters
from quantkit.core.heads import HeadSizes
from quantkit.core.plan import AttentionPlan, ModelPlan
from quantkit.discovery.attention import find_attention
from quantkit.pipeline.check import Request
from quantkit.pipeline.convert import change
from quantkit.pipeline.data import Data


def attention_to_round(model: nn.Module, request: Request, data: Data) -> dict[str, HeadSizes]:
    """Name -> sizes of the modules whose attention the scheme rounds; none where it rounds none.

    Raises:
        ModelError: no call of attention could be seen, or one has sizes that cannot be had.
        CalibrationError: the data is needed again, and can be walked through only once.
    """
    if request.scheme is None or not request.scheme.quantizes_attention:
        return {}
    if request.is_static or _label(request) is not None:
        data.check_walks_again("calibrating attention, once linears are quantized,")
    return find_attention(model, data.first)


def decide_attention(
    model: nn.Module, plan: ModelPlan, request: Request, data: Data, heads: Mapping[str, HeadSizes]
) -> dict[str, AttentionPlan]:
    """How the attention of these modules is rounded.

    Ranges have to be those of the model that will run: folds change the values of attention, and rounding all that is before
    it. So the model is converted for the time of one pass over the data, and put back, whatever happens.

    Raises:
        CalibrationError: a module is not called, or a value is not finite.
    """
    if not heads:
        return {}
    assert request.scheme is not None
    with ExitStack() as undo:
        if request.is_static or _label(request) is not None:
            change(model, plan, progress=False, undo=undo)
        quantizers = calibrate_attention(model, heads, request.scheme, data.batches, _label(request), progress=request.progress)
    return {
        name: AttentionPlan(q.scheme, q.heads, q.clusters, {key: t.clone() for key, t in q.state_dict().items()})
        for name, q in quantizers.items()
    }


def _label(request: Request) -> Label | None:
    """The function of a calibrator that puts the channels of heads into clusters, if one does."""
    found = (c for c in request.calibrators if isinstance(c, HeadClusters) and c.head_clusters > 1)
    return next((c.label_head for c in found), None)
