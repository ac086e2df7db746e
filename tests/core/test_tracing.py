"""What stands between a call and its result."""

from __future__ import annotations

import pytest
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode

from quantkit.core.tracing import FunctionMode


def leave_without_it(error: BaseException | None) -> None:
    """As PyTorch does for a moment, whenever it calls a mode."""
    with FunctionMode():
        _pop_mode()
        if error is not None:
            raise error


def test_an_interruption_passes_through_a_mode() -> None:
    """It came out as a RuntimeError about an empty stack, which was taken for one of the model's code."""
    with pytest.raises(KeyboardInterrupt):
        leave_without_it(KeyboardInterrupt())
    for error in (ValueError("of the model"), None):
        with pytest.raises(RuntimeError, match="empty mode stack"):
            leave_without_it(error)
    assert _len_torch_function_stack() == 0
