"""The matrix that is written into weights: orthogonal, flat, and the mean over channels stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.core.rotation import BlockRotation


@given(width=st.one_of(st.integers(1, 200), st.sampled_from([576, 768, 1024, 2880])), seed=st.integers(0, 2**31))
def test_rotation_is_orthogonal_and_keeps_the_mean(width: int, seed: int) -> None:
    matrix = BlockRotation(width, seed).apply(torch.eye(width, dtype=torch.float64))
    assert float((matrix @ matrix.T - torch.eye(width)).abs().max()) < 1e-12
    assert float((matrix.sum(0) - 1).abs().max()) < 1e-12
    x = torch.randn(3, 2 * width)
    halves = [(half.double() @ matrix) for half in x.split(width, 1)]
    torch.testing.assert_close(BlockRotation(width, seed).apply(x), torch.cat(halves, 1), rtol=0, atol=1e-11)
    order = torch.randperm(2 * width)
    mixed = BlockRotation(width, seed, order).apply(x)
    torch.testing.assert_close(mixed[:, order], BlockRotation(width, seed).apply(x[:, order]), rtol=0, atol=0)


@pytest.mark.parametrize("width", [64, 96, 576, 1024])
def test_rotation_is_nearly_flat(width: int) -> None:
    matrix = BlockRotation(width).apply(torch.eye(width))
    assert float(matrix.abs().max()) < 5 / width**0.5
    assert not torch.equal(matrix, BlockRotation(width, 1).apply(torch.eye(width)))
