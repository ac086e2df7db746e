"""Each operation of ``program.c`` beside PyTorch's, on whatever shapes, strides and types; and what is left to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.ops.cpu.native import library
from quantkit.ops.cpu.program import LOWERED, Program, lowered

pytestmark = pytest.mark.skipif(library() is None, reason="the C passes are not built here")
aten = torch.ops.aten
HOSTILE = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-38, 3e38, -100.0, 100.0, 1e-45])


def run(operator: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What C and PyTorch say."""
    wanted = operator(*args, **kwargs)
    out = [torch.full_like(t, 7) if isinstance(t, Tensor) else t for t in (wanted if isinstance(wanted, tuple) else [wanted])]
    program = Program()
    given = out if isinstance(wanted, tuple) else out[0]
    assert lowered(program, operator, args, kwargs, given)
    program.run(threads=2)
    return given, wanted


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    if not got.is_floating_point():
        assert torch.equal(got, wanted)
        return
    tolerance = 1e-6 if got.dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=1e-6, equal_nan=True)


@st.composite
def tensors(draw: Any, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Tensors that broadcast to each other; some axes are transposed, some expanded."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    found = []
    for i in range(count):
        own = [size if i == 0 or draw(st.booleans()) else 1 for size in shape]
        own = own[draw(st.integers(0, len(own))) if i else 0 :]
        random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        if dtype == torch.int64:
            x = torch.randint(-9, 9, own, generator=random)
        elif dtype == torch.bool:
            x = torch.randint(0, 2, own, generator=random).bool()
        else:
            x = torch.randn(own, generator=random).to(dtype) * 3
            if draw(st.booleans()) and x.numel():
                x.view(-1)[:12] = HOSTILE[: x.numel()].to(dtype)
        if x.dim() > 1 and draw(st.booleans()):
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        found.append(x)
    return found


FLOATS = [torch.float32, torch.bfloat16]
TWO = {
    "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor, "le": aten.le.Tensor,
    "lt": aten.lt.Tensor, "ge": aten.ge.Tensor, "gt": aten.gt.Tensor, "eq": aten.eq.Tensor, "ne": aten.ne.Tensor,
}  # fmt: skip
ONE = ["neg", "rsqrt", "sqrt", "exp", "silu", "relu", "tanh", "sigmoid", "cos", "sin"]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
@pytest.mark.parametrize("name", TWO)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_of_two(name: str, dtype: torch.dtype, data: Any) -> None:
    if name == "div" and dtype == torch.int64:
        return
    a, b = data.draw(tensors(2, dtype))
    close(*run(TWO[name], a, b))
    close(*run(TWO[name], b, a))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ONE)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_of_one(name: str, dtype: torch.dtype, data: Any) -> None:
    (x,) = data.draw(tensors(1, dtype))
    x = x.clamp(-80, 80) if name in ("cos", "sin") else x
    close(*run(getattr(aten, name).default, x))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_booleans_and_choices(data: Any) -> None:
    a, b = data.draw(tensors(2, torch.bool))
    close(*run(aten.bitwise_and.Tensor, a, b))
    close(*run(aten.logical_or.default, a, b))
    x, y = torch.randn(a.shape), torch.randn(b.shape)
    close(*run(aten.where.self, a, x, y))
    close(*run(aten.where.self, b, x, torch.tensor(-torch.inf)))


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_rows(dtype: torch.dtype, data: Any) -> None:
    (x,) = data.draw(tensors(1, dtype))
    close(*run(aten.mean.dim, x, [-1], True))
    close(*run(aten.mean.dim, x, [x.dim() - 1]))
    k = x.shape[-1]
    weight, bias = torch.randn(k).to(dtype), torch.randn(k).to(dtype)
    finite = x.nan_to_num(1.0, 2.0, -2.0).clamp(-50, 50)
    for options in ((weight, bias), (None, None)):
        (got, *_), (wanted, *_) = run(aten.native_layer_norm.default, finite, [k], *options, 1e-5)
        torch.testing.assert_close(
            got, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2 if dtype == torch.bfloat16 else 1e-4
        )


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_rest(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, 5).to(dtype)
    close(*run(aten.cat.default, [x, y], -1))
    close(*run(aten.cat.default, [x[:, :1], x], 1))
    close(*run(aten.pow.Tensor_Scalar, x, 2))
    close(*run(aten.add.Tensor, x, 1e-6))
    close(*run(aten.mul.Tensor, x, 0.1))
    for kind in ("none", "tanh"):
        close(*run(aten.gelu.default, x, approximate=kind))
    close(*run(aten.clone.default, x.transpose(0, 2), memory_format=torch.contiguous_format))
    close(*run(aten._to_copy.default, torch.arange(5), dtype=torch.float32))
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    close(*run(aten._to_copy.default, x, dtype=other))
    table, ids = torch.randn(7, 6).to(dtype), torch.tensor([[0, 6], [3, 3]])
    close(*run(aten.embedding.default, table, ids))


def index_copied(target: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    program, mine = Program(), target.clone()
    assert lowered(program, aten.index_copy_.default, (mine, dim, index, source), {}, mine)
    program.run(threads=1)
    return mine


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 3, 8, 4), (2, 3, 8, 4), (5, 8, 2)])
def test_copies_to_indices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target, dim = torch.randn(shape).to(dtype), len(shape) - 2
    for index in (torch.tensor([3]), torch.tensor([7, 0])):
        size = (*shape[:dim], len(index), *shape[dim + 1 :])
        source = torch.randn(size).to(dtype)
        close(index_copied(target, dim, index, source), target.clone().index_copy_(dim, index, source))
        turned = source.transpose(0, dim).contiguous().transpose(0, dim)
        close(index_copied(target, dim, index, turned), target.clone().index_copy_(dim, index, source))


@pytest.mark.parametrize("index", [-1, 8, 2**40])
def test_indices_outside_are_errors(index: int) -> None:
    with pytest.raises(IndexError, match="index_copy"):
        index_copied(torch.zeros(1, 2, 8, 4), 2, torch.tensor([index]), torch.ones(1, 2, 1, 4))
    program, out = Program(), torch.zeros(1, 4)
    table, ids = torch.randn(8, 4), torch.tensor([0])
    assert lowered(program, aten.embedding.default, (table, ids), {}, out)
    program.run(threads=1)
    ids.fill_(index)
    with pytest.raises(IndexError, match="embedding"):
        program.run(threads=1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("keys", [1, 5, 300])
def test_attention(keys: int, kind: str, share: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 2, 16).to(dtype), torch.randn(2, 6 // share, keys, 16).to(dtype)
    v = torch.randn_like(k)
    mask: Tensor | None = torch.rand(2, 1, 2, keys) < 0.6
    assert mask is not None
    mask[..., 0] = True
    bias = torch.where(mask, torch.randn(mask.shape), -torch.inf).to(dtype)
    mask = {"none": None, "bool": mask, "float": bias}[kind]
    operator, out = (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.zeros(2, 2, 6, 16, dtype=dtype).transpose(1, 2),
    )
    program = Program()
    result = (out, torch.zeros(2, 6, 2))
    assert lowered(program, operator, (q, k, v), {"attn_mask": mask, "scale": 0.3}, result)
    program.run(threads=2)
    wanted = F.scaled_dot_product_attention(
        q.float(),
        k.float(),
        v.float(),
        attn_mask=mask if mask is None or kind == "bool" else mask.float(),
        scale=0.3,
        enable_gqa=True,
    )
    torch.testing.assert_close(
        out.float(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5 if dtype == torch.float32 else 1e-2
    )


X = torch.randn(3, 4)
LEFT: dict[str, Callable[[], tuple[Any, tuple[Any, ...], Any]]] = {
    "float64": lambda: (aten.add.Tensor, (X.double(), X.double()), X.double()),
    "types that differ": lambda: (aten.add.Tensor, (X, X.bfloat16()), X),
    "integers divided": lambda: (aten.div.Tensor, (torch.arange(3), torch.arange(3)), torch.zeros(3)),
    "cubes": lambda: (aten.pow.Tensor_Scalar, (X, 3), X),
    "another axis": lambda: (aten.mean.dim, (X, [0], True), X[:1]),
    "nothing": lambda: (aten.neg.default, (X[:0],), X[:0]),
    "six axes": lambda: (aten.neg.default, (torch.zeros([2] * 6),), torch.zeros([2] * 6)),
    "one query that sees the first of several keys": lambda: (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        (X.view(1, 3, 1, 4), torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4), 0.0, True),
        (X.view(1, 3, 1, 4), X[:, :1].view(1, 3, 1)),
    ),
    "another operator": lambda: (aten.mm.default, (X, X.t()), torch.zeros(3, 3)),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_pytorch(case: str) -> None:
    operator, args, out = LEFT[case]()
    program = Program()
    assert not lowered(program, operator, args, {}, out)
    assert not program.list


def test_every_operator_is_one_of_pytorch() -> None:
    assert all(isinstance(operator, torch._ops.OpOverload) for operator in LOWERED)
