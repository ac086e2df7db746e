"""A model is run when it is saved, and again when it has been opened: it must still say the same.

Hashes show that the files are those that were written. They do not show that the model around the layers is the one that was
saved: another version of a library, a class that computes differently, a tensor that no file holds. So a checkpoint has an
input, a digest of the outputs and a sample of them. The same machine gives the same bits. On another one, float arithmetic
rounds differently, and now and then a code is another one; then the sample must be as near as the INT8 model is to the float
model.

The check stands in a file of its own, in safetensors format, and under ``"check"`` in the record.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantkit.calibration.data import device_of
from quantkit.checkpoint.files import inside
from quantkit.checkpoint.record import RECORD_FILE
from quantkit.checkpoint.tensors import Entry, read_tensors, write_shards
from quantkit.core.errors import CheckpointError
from quantkit.core.report import Report
from quantkit.discovery.equivalence import decibels, relative_error, run_alike
from quantkit.model.example import example_of, keep_example
from quantkit.model.modules import all_tensors, map_tensors, memory_of

log = logging.getLogger("quantkit")

CHECK_FILE = "quantkit-check.safetensors"
MAX_BYTES = 4 * 2**20
"""Of the input that a checkpoint holds."""
SAMPLE = 4096
"""Values of each output that it holds."""
SLACK_DB = 6.0
"""The opened model may be this much farther from the saved one than the saved one is from the float model."""


@dataclass(frozen=True)
class Check:
    """What a checkpoint says of the model that was saved.

    Attributes:
        folder: the checkpoint.
        batch: what the model is run on.
        samples: of its outputs, see :data:`SAMPLE`.
        digest: SHA-256 of the outputs.
    """

    folder: Path
    batch: Any
    samples: list[Tensor]
    digest: str


def write_check(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Run ``model`` and write what it says to a file in ``folder``.

    Returns:
        What the record says under ``"check"``: either ``why_not``, or the form of the input and the digest of the outputs.
    """
    batch = example_of(model)
    if batch is None:
        return _none("the model was not run when it was quantized")
    tensors = all_tensors(batch)
    if sum(t.nbytes for t in tensors) > MAX_BYTES:
        return _none(f"its input is larger than {MAX_BYTES >> 20} MiB")
    try:
        form = _form(batch, iter(range(len(tensors))))
        outputs, others = (run_alike(model, _beside(batch, model), seed) for seed in (0, 1))
    except Exception as error:  # noqa: BLE001  whatever the model's own code makes of made-up numbers
        return _none(f"it does not run on made-up numbers ({type(error).__name__}: {error})")
    if not outputs or not all(bool(t.isfinite().any()) for t in outputs):
        return _none("it has no finite floating-point output")
    if relative_error(outputs, others) > 1e-3:
        return _none("it draws random numbers")
    kept = {f"input.{i}": t for i, t in enumerate(tensors)} | {f"output.{i}": _sample(t) for i, t in enumerate(outputs)}
    write_shards([Entry.of(name, t) for name, t in kept.items()], folder, 2**63, alone=CHECK_FILE)
    return {"input": form, "sha256": _digest(outputs)}


def read_check(folder: Path, record: Mapping[str, Any]) -> Check | None:
    """What :func:`write_check` wrote, from the record of a checkpoint; None where there is nothing.

    Raises:
        CheckpointError: it is damaged.
    """
    check = record.get("check", {"why_not": "it was saved by an older quantkit"})
    if "why_not" in check:
        log.info("the opened model will not be compared with what it said when it was saved: %s", check["why_not"])
        return None
    file = inside(folder, CHECK_FILE, RECORD_FILE)
    stored = read_tensors(file.parent, [file.name])
    try:
        samples = [stored[f"output.{i}"] for i in range(sum(name.startswith("output.") for name in stored))]
        return Check(folder, _filled(check["input"], stored), samples, str(check["sha256"]))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: what the model is to be run on cannot be read ({error})") from None


def run_again(model: nn.Module, check: Check, report: Report) -> None:
    """Run a model that was opened, and compare what it says with what it said when it was saved.

    Args:
        model: it keeps the input, so that it can be saved with a check again.
        check: from the checkpoint.
        report: says how far the INT8 model was from the float model.

    Raises:
        CheckpointError: the model does not run, or says something else.
    """
    way_out = "look for another version of the library that the model is from; verify=False opens it as it is"
    try:
        outputs = run_alike(model, _beside(check.batch, model))
    except Exception as error:  # whatever this environment makes of the model
        raise CheckpointError(f"{check.folder}: the model does not run ({type(error).__name__}: {error}): {way_out}") from error
    keep_example(model, check.batch)
    if _digest(outputs) == check.digest:
        log.info("the opened model gives the same bits as when it was saved")
        return
    samples = [_sample(t) for t in outputs]
    if [t.shape for t in samples] != [t.shape for t in check.samples]:
        raise CheckpointError(f"{check.folder}: the outputs of the model are not of the shapes that they had: {way_out}")
    nearest = min((decibels(a, b) for a, b in zip(check.samples, samples, strict=True)), default=math.inf)
    if not nearest >= _bound(report):
        raise CheckpointError(
            f"{check.folder}: the model is at {nearest:.1f} dB from what it said when it was saved, and should be at "
            f"{_bound(report):.1f} dB or more even on another machine: {way_out}"
        )
    log.info("the opened model is at %.1f dB from what it said when it was saved, on another machine or backend", nearest)


def _beside(batch: Any, model: nn.Module) -> Any:
    """``batch`` where the model is."""
    return map_tensors(batch, lambda t: t.to(device_of(model)))


def _none(why: str) -> dict[str, Any]:
    log.info("the checkpoint says nothing of what the model computes: %s", why)
    return {"why_not": why}


def _bound(report: Report) -> float:
    """The least signal to noise ratio in dB that other arithmetic may lead to."""
    known = None if report.verification is None else report.verification.sqnr_db
    return max(0.0, min(60.0, 20.0 if known is None else known) - SLACK_DB)


def _sample(t: Tensor) -> Tensor:
    """Up to :data:`SAMPLE` values of a tensor, evenly spaced, in float32."""
    flat = t.detach().flatten()
    return flat[:: max(1, -(-flat.numel() // SAMPLE))].float().cpu()


def _digest(outputs: Sequence[Tensor]) -> str:
    whole = hashlib.sha256()
    for t in outputs:
        whole.update(str(tuple(t.shape)).encode())
        if t.numel():
            whole.update(memory_of(t.detach().cpu().contiguous()))
    return whole.hexdigest()


def _form(value: Any, numbers: Any) -> Any:
    """A batch as JSON, with the numbers of its tensors in their place."""
    if isinstance(value, Tensor):
        return {"tensor": next(numbers)}
    if isinstance(value, Mapping):
        return {"mapping": {name: _form(item, numbers) for name, item in value.items()}}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return {"list" if isinstance(value, list) else "tuple": [_form(item, numbers) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} in the input, which JSON does not hold")


def _filled(form: Any, stored: Mapping[str, Tensor]) -> Any:
    """The batch that :func:`_form` described."""
    ((kind, value),) = form.items()
    if kind == "tensor":
        return stored[f"input.{value}"]
    if kind == "mapping":
        return {name: _filled(item, stored) for name, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_filled(item, stored) for item in value]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return value
    raise ValueError(f"{kind!r} is no kind of value")
