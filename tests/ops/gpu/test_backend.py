"""What the backend for GPUs takes, and what it asks the kernels for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantkit.core.formats import Float, Int, PerGroup, PerToken, Quantized
from quantkit.core.operand import Operand
from quantkit.core.rewrite import Rewrite
from quantkit.core.rotation import Rotation
from quantkit.ops.gpu.backend import GPU, GPUPrepared, factors_of
from quantkit.ops.plain import PlainPrepared

CPU = torch.device("cpu")  # on which Triton's interpreter runs


def operand(**others: Any) -> Operand:
    codes = torch.randint(-127, 128, (8, 32), dtype=torch.int8)
    return Operand(32, codes, torch.rand(8, 1), **others)


TOKENS, ASYMMETRIC = Quantized(Int(8), PerToken()), Quantized(Int(8, symmetric=False), PerToken())
SHIFT = torch.zeros(32)
REFUSED = {
    "groups of the weight only": operand(
        weight=Quantized(Int(), PerGroup(16)), multipliers=torch.ones(8, 2, dtype=torch.int8), input=TOKENS
    ),
    "a threshold and a shift": operand(rewrite=Rewrite(shift=SHIFT, threshold=6.0)),
    "a threshold and zero points": operand(rewrite=Rewrite(threshold=6.0), input=ASYMMETRIC),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_run_has_a_reason(name: str) -> None:
    assert GPU().why_not(REFUSED[name], CPU)


TAKEN = {
    "plain": operand(), "asymmetric": operand(input=ASYMMETRIC), "shift": operand(rewrite=Rewrite(shift=SHIFT)),
    "threshold": operand(rewrite=Rewrite(threshold=6.0)),
    "groups": operand(
        weight=Quantized().in_groups((16, 16)), multipliers=torch.ones(8, 2), input=TOKENS.in_groups((16, 16))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_kernels_run(name: str) -> None:
    assert GPU().why_not(TAKEN[name], CPU) is None
    assert GPU().why_not(None, CPU) is None


def test_activations_in_floating_point_are_left_to_the_reference() -> None:
    assert type(GPU().prepare(operand(input=Float()))) is PlainPrepared


def test_the_kernels_are_asked_for_what_an_operand_has_and_nothing_else() -> None:
    plain, shifted = GPU().prepare(operand()), GPU().prepare(operand(rewrite=Rewrite(shift=SHIFT)))
    assert isinstance(plain, GPUPrepared)
    assert isinstance(shifted, GPUPrepared)
    assert plain.making == {"bits": 8, "symmetric": True, "align": 16}
    assert shifted.making.keys() - plain.making.keys() == {"shift"}


def test_factors_are_in_the_channels_of_the_input() -> None:
    """The signs of a rotation come after the order of the channels, the pre-scale before."""
    order, signs, scale = torch.randperm(32), torch.randint(0, 2, (32,)) * 2.0 - 1, torch.rand(32)
    rewrite = Rewrite(pre_scale=scale, permutation=order, rotation=Rotation(8, signs))
    x, factors = torch.randn(3, 32), factors_of(rewrite)
    assert factors is not None
    without = replace(rewrite, pre_scale=None, rotation=Rotation(8))
    torch.testing.assert_close(without.apply(x * factors)[0], rewrite.apply(x)[0])


def test_quantkit_imports_no_triton_and_leaves_inductor_alone() -> None:
    """The graph pass is a setting of the whole process: it waits for the operators to be needed."""
    script = "import sys, quantkit; assert not {'triton', 'torch._dynamo', 'torch._inductor'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
