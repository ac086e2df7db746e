"""Placeholder until the kernels take operands."""

from __future__ import annotations

import torch

from quantkit.core.operand import Operand
from quantkit.ops.plain import Plain


class GPU(Plain):
    """The backend called ``"triton"``."""

    name = "triton"

    def why_not(self, operand: Operand | None, device: torch.device) -> str | None:
        return "its kernels are being moved"
