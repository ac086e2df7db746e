"""The kernels that make codes, run by Triton's interpreter against exact arithmetic.

Whole layers go through test_contract.py. The Gluon kernels have no interpreter: the values of one are in test_order.py, and
``benchmarks/check_gpu.py`` runs them on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quantkit.core.errors import BackendError
from quantkit.core.rotation import Rotation
from quantkit.ops import reference
from quantkit.ops.gpu import operators
from quantkit.ops.gpu.codes.door import make_codes
from quantkit.ops.gpu.codes.kernels import ORDER, PORTABLE, ROWS
from quantkit.ops.gpu.codes.request import CodesRequest
from quantkit.ops.gpu.kernel import Kernel
from quantkit.ops.gpu.layout import padded


def quantize(x: Tensor, **options: Any) -> list[Tensor]:
    return make_codes(CodesRequest(x, **options))


@given(st.integers(1, 20), st.integers(1, 9000), st.sampled_from([0.0, 1e-4, 0.1, 1.0]))
def test_columns_that_reach_a_threshold(m: int, k: int, share: float) -> None:
    x = torch.where(torch.rand(m, k) < share, 7.0, 1.0) * torch.randn(m, k).sign()
    x[0, 0], x[0, -1] = -torch.inf, torch.nan  # which say nothing of their columns
    q, scale, active = quantize(x, threshold=6.0)
    large, columns = reference.reaching(x, 6.0)
    wanted = reference.quantize_rows(x.masked_fill(large, 0))
    assert_same([q[:, :k], scale], [wanted[0], wanted[1]])
    assert_same(active[1 : 1 + int(active[0])].long(), columns.nonzero().view(-1))


@given(st.integers(1, 9), st.integers(1, 300), st.booleans(), st.sampled_from([2, 4, 8]), st.booleans())
def test_quantize(m: int, k: int, symmetric: bool, bits: int, strided: bool) -> None:
    x = torch.randn(m, k) * torch.logspace(-6, 6, m)[:, None]
    x = torch.stack([x, x], 2)[..., 0] if strided else x
    got = quantize(x, symmetric=symmetric, bits=bits)
    wanted = [t for t in reference.quantize_rows(x, symmetric=symmetric, bits=bits) if t is not None]
    assert got[0].shape == (m, padded(k))
    assert_same([got[0][:, :k], *got[1:]], wanted)


SOURCES = {
    "rms": lambda x, y, gain, bias: F.rms_norm(x, x.shape[1:], gain, 1e-6),
    "layer": lambda x, y, gain, bias: F.layer_norm(x, x.shape[1:], gain, bias, 1e-6),
    "silu": lambda x, y, gain, bias: F.silu(x) * y,
    "gelu": lambda x, y, gain, bias: F.gelu(x) * y,
    "gelu_tanh": lambda x, y, gain, bias: F.gelu(x, approximate="tanh") * y,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("k", [64, 300])
@pytest.mark.parametrize("rotation", [0, 4])
def test_what_comes_before(source: str, k: int, rotation: int) -> None:
    x, y, gain, bias = torch.randn(5, k), torch.randn(5, k), torch.randn(k), torch.randn(k)
    scale = torch.rand(k) + 0.5
    more = {"gain": gain, "eps": 1e-6} if source in ("rms", "layer") else {"x2": y}
    more |= {"bias": bias} if source == "layer" else {}
    wanted = SOURCES[source](x, y, gain, bias) * scale
    wanted = Rotation(rotation).apply(wanted) if rotation else wanted
    near(quantize(x, source=source, pre_scale=scale, rotation=rotation, **more), wanted)


@pytest.mark.parametrize("source", ["rms", "layer"])
def test_residual(source: str) -> None:
    """The sum is kept, and normed as it is kept; an offset gain as Gemma has it; the channels in another order."""
    x, y, gain, order = torch.randn(3, 48), torch.randn(3, 48), torch.randn(48), torch.randperm(48)
    *got, kept = quantize(x, source=source, x2=y, gain=gain, offset=1.0, eps=1e-6, permutation=order)
    assert_same(kept, x + y)
    near(got, SOURCES[source](x + y, y, gain + 1, None)[:, order])


def near(got: list[Tensor], wanted: Tensor) -> None:
    q, scale, _ = reference.quantize_rows(wanted)
    torch.testing.assert_close(got[1], scale, rtol=1e-5, atol=0)
    off = (got[0][:, : q.shape[1]].int() - q.int()).abs()
    assert int(off.max()) <= 1
    assert float(off.float().mean()) < 0.01


def test_no_rows() -> None:
    q, scale = quantize(torch.zeros(0, 32))
    assert (q.shape, scale.shape) == ((0, 32), (0, 1))


def test_side_columns_of_a_fused_source_are_refused() -> None:
    with pytest.raises(ValueError, match="side columns"):
        quantize(torch.ones(1, 16), source="rms", side_index=torch.tensor([0]))


@pytest.mark.parametrize(("options", "message"), [
    ({"source": "silu"}, "x2"), ({"source": "relu"}, "not known"), ({"x2": torch.ones(1, 16)}, "not known"),
])  # fmt: skip
def test_sources_that_are_none_or_lack_something_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(1, 16), **options)


def test_an_option_that_no_request_has_is_an_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        operators.quantize(torch.ones(1, 16), colour=3)


def test_a_field_that_no_kernel_handles_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a field would be that is new, and that nobody has taught a kernel yet."""

    class Older(type(PORTABLE)):  # type: ignore[misc]
        handles = PORTABLE.handles - {"shift"}

    monkeypatch.setattr("quantkit.ops.gpu.codes.door.PORTABLE", Older())
    assert quantize(torch.ones(1, 16))[0].shape == (1, 16)
    with pytest.raises(BackendError, match="shift"):
        quantize(torch.ones(1, 16), shift=torch.ones(16))


def test_a_kernel_cannot_handle_what_no_request_has() -> None:
    with pytest.raises(TypeError, match="colour"):

        class Wrong(Kernel):
            name, request, handles = "wrong", CodesRequest, frozenset({"x", "colour"})


VALUES: dict[str, Any] = {
    "symmetric": False, "bias": torch.ones(4096), "rotation": 64, "shift": torch.ones(4096), "side_index": torch.zeros(1),
    "side_mask": torch.zeros(4096), "in_scale": torch.ones(1), "in_zero": torch.ones(1), "threshold": 6.0, "warps": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_the_faster_kernels_leave_what_they_do_not_handle(name: str) -> None:
    whole = CodesRequest(torch.ones(64, 4096).half(), permutation=torch.arange(4096))
    asked = whole._replace(**{name: VALUES[name]})
    for kernel in (ORDER, ROWS):
        assert kernel.why_not(whole) is None
        handled = kernel is ROWS and name in ("bias", "rotation")
        assert (kernel.why_not(asked) is None) == handled
