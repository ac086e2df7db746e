"""Telling ``torch.compile`` how to treat a function, without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_while_tracing(function: F) -> F:
    """Mark ``function`` so that Dynamo runs it while it traces, and takes its result for a constant.

    ``torch.compiler.assume_constant_result`` does the same, but it imports ``torch._dynamo`` first. That takes longer than
    importing all of quantkit, also for those who never compile anything.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the attribute that Dynamo looks for
    return function
