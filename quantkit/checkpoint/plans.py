"""Plans as folders: ``plan.json`` says everything but the tensors, which are in ``plan.safetensors``.

A folder appears whole or not at all. The JSON holds the SHA-256 of the tensors and of itself, so a plan that was changed or
truncated is refused, and only plain data is read: nothing in such a folder can run code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from quantkit.checkpoint.files import as_one, inside, old_copies, read_object, sha256_of, written_whole
from quantkit.checkpoint.record import digest_of
from quantkit.checkpoint.tensors import Entry, read_tensors, write_shards
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.core.formats import FORMAT_KINDS
from quantkit.core.heads import HeadSizes
from quantkit.core.plan import AttentionPlan, Codes, LinearPlan, ModelPlan, SitePlan
from quantkit.core.report import LayerRecord, Report
from quantkit.core.rotation import Rotation
from quantkit.core.scheme import Scheme
from quantkit.core.sites import Carriers, Kept, Producer, Site
from quantkit.core.spaces import Gain, ResidualStream, SpaceRotation, ValueHeads
from quantkit.core.transform import Transform
from quantkit.core.values import read, written

PLAN_FILE, TENSORS_FILE = "plan.json", "plan.safetensors"
FORMAT_VERSION = 1
KINDS = (
    AttentionPlan, Carriers, Codes, Gain, HeadSizes, Kept, LayerRecord, LinearPlan, ModelPlan, Producer, Report, ResidualStream,
    Rotation, Scheme, Site, SitePlan, SpaceRotation, Transform, ValueHeads, *FORMAT_KINDS,
)  # fmt: skip
"""What a plan is made of."""


def save_plan(plan: ModelPlan, path: str | os.PathLike[str]) -> Path:
    """Write what :func:`quantkit.plan` decided to the folder ``path``.

    Args:
        plan: the plan.
        path: a folder that does not exist, is empty, or holds a plan (which is replaced as a whole).

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds something else.
    """
    target = Path(path)
    tensors: dict[str, Any] = {}
    body: dict[str, Any] = {"format": "quantkit plan", "format_version": FORMAT_VERSION, "plan": written(plan, tensors)}
    entries = [Entry.of(name, tensor) for name, tensor in tensors.items()]
    with written_whole(target, lambda place: (place / PLAN_FILE).is_file(), "plan", sum(e.nbytes for e in entries)) as folder:
        if entries:
            write_shards(entries, folder, 2**63, alone=TENSORS_FILE)
            body["sha256"] = sha256_of(folder / TENSORS_FILE)
        body["digest"] = digest_of(body)
        (folder / PLAN_FILE).write_text(json.dumps(body), encoding="utf-8")
    return target


def load_plan(path: str | os.PathLike[str], *, device: Any = "cpu") -> ModelPlan:
    """The plan that :func:`save_plan` wrote to the folder ``path``.

    Args:
        path: the folder.
        device: where its tensors go; that of the model which the plan will change.

    Raises:
        CheckpointError: it is missing, damaged, changed, or of another version.
    """
    folder = Path(path)
    return as_one(folder, lambda: _read(folder, device))


def _read(folder: Path, device: Any) -> ModelPlan:
    if not (folder / PLAN_FILE).is_file():
        raise CheckpointError(f"{folder} holds no plan: it has no {PLAN_FILE}{old_copies(folder)}")
    body = read_object(folder, PLAN_FILE)
    digest = body.pop("digest", None)
    if body.get("format") != "quantkit plan" or body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{folder / PLAN_FILE} is no plan of this version of quantkit: decide again")
    if digest != digest_of(body):
        raise CheckpointError(f"{folder / PLAN_FILE} was changed after it was written (its digest does not match)")
    tensors = {}
    if "sha256" in body:
        file = inside(folder, TENSORS_FILE, PLAN_FILE)
        if sha256_of(file) != body["sha256"]:
            raise CheckpointError(f"{file} was changed after it was written (its SHA-256 does not match)")
        tensors = {name: t.to(device) for name, t in read_tensors(folder, [TENSORS_FILE]).items()}
    try:
        plan = read(body["plan"], tensors, KINDS)
    except (QuantkitError, KeyError) as error:
        raise CheckpointError(f"{folder / PLAN_FILE} is damaged: {error}") from None
    if not isinstance(plan, ModelPlan):
        raise CheckpointError(f"{folder / PLAN_FILE} is damaged: it holds a {type(plan).__name__}, not a plan")
    return plan
