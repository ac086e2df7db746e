"""What the kernels ask about the GPU that they are to run on. Imports no Triton, so that asking costs nothing without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from quantkit.core.errors import BackendError
from quantkit.core.tracing import constant_while_tracing

PROCESSORS = 132
"""Streaming multiprocessors of an H100, for which the tables of shapes and tiles are made."""


@constant_while_tracing  # the search for Triton cannot be traced
def why_not(device: torch.device) -> str | None:
    """None if the kernels run on ``device``, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's own interpreter: any device, very slow, for tests
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (A100) or newer"
    return None


def tunable(device: str | torch.device) -> torch.device:
    """The GPU of this name, with its index.

    Raises:
        BackendError: there is none, or none that the kernels run on.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"{device!r} is no device: {str(error).splitlines()[0]}") from None
    if found.type != "cuda" or not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
        raise BackendError(f"cannot tune for {device}: it is no NVIDIA GPU of this machine")
    found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    if reason := why_not(found):
        raise BackendError(f"cannot tune for {device}: {reason}")
    return found


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as one number: 80 for A100, 89 for L4 and 4090, 90 for H100; 0 under Triton's interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start before the one that it depends on has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of this GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    import triton

    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])
