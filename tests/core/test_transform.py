"""Transforms preserve ``x W^T + b``, alone and composed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit import MethodError, Rotation, Transform
from quantkit.core.rotation import hadamard

TOKENS, ROWS = 3, 5


@st.composite
def transforms(draw: st.DrawFn, k: int, *, outliers: bool = True, rotation: bool = True) -> Transform:
    """Any combination of fields; shifts are eighths and scales powers of two, so that composing them is exact."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def maybe(value: object) -> object:
        return value if draw(st.booleans()) else None

    signs = torch.randint(0, 2, (k,), generator=random) * 2.0 - 1
    block = draw(st.sampled_from([b for b in (1, 2, 4, 8, 16) if k % b == 0]))
    count = draw(st.integers(0, k))
    return Transform(
        shift=maybe(torch.randint(-16, 17, (k,), generator=random) / 8),
        scale=maybe(2.0 ** torch.randint(-3, 4, (k,), generator=random)),
        outliers=maybe(torch.randperm(k, generator=random)[:count]) if outliers else None,
        permutation=maybe(torch.randperm(k, generator=random)),
        rotation=maybe(Rotation(block, maybe(signs))) if rotation else None,
    )


sizes = st.sampled_from([1, 4, 6, 16])


def drawn(k: int) -> tuple[Tensor, Tensor]:
    return torch.randn(TOKENS, k, dtype=torch.float64), torch.randn(ROWS, k, dtype=torch.float64)


def assert_preserves(t: Transform, k: int) -> None:
    x, w = drawn(k)
    (inner, side), (weight, side_weight), bias = t.activation(x), t.weight(w), t.bias(w)
    y = inner @ weight.T + (0 if bias is None else bias)
    assert (side is None) == (side_weight is None) == (t.outliers is None)
    if side is not None:
        y = y + side @ side_weight.T
        assert side.shape == (TOKENS, len(t.outliers))
        if t.rotation is None:
            assert (inner == 0).sum(1).ge(len(t.outliers)).all()  # what the side product holds, the integers do not
    torch.testing.assert_close(y, x @ w.T, rtol=0, atol=1e-12)


@given(st.data())
def test_function_is_preserved(data: st.DataObject) -> None:
    k = data.draw(sizes)
    assert_preserves(data.draw(transforms(k)), k)


@given(st.data())
def test_function_is_preserved_by_compositions(data: st.DataObject) -> None:
    k = data.draw(sizes)
    part = transforms(k, rotation=False)
    assert_preserves(data.draw(part).then(data.draw(part)).then(data.draw(transforms(k))), k)


@given(st.data())
def test_then_is_one_after_the_other(data: st.DataObject) -> None:
    k = data.draw(sizes)
    first, second = data.draw(transforms(k, outliers=False, rotation=False)), data.draw(transforms(k))
    x, w = drawn(k)
    for side in ("activation", "weight"):
        value = x if side == "activation" else w
        at_once, in_turn = getattr(first.then(second), side)(value), getattr(second, side)(getattr(first, side)(value)[0])
        for got, wanted in zip(at_once, in_turn, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@given(st.data())
def test_then_is_associative_and_has_a_neutral_element(data: st.DataObject) -> None:
    k = data.draw(sizes)
    a, b = (data.draw(transforms(k, rotation=False)) for _ in range(2))
    c, x = data.draw(transforms(k)), drawn(k)[0]
    left, right = a.then(b).then(c).activation(x)[0], a.then(b.then(c)).activation(x)[0]
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    assert c.then(Transform()) is c
    torch.testing.assert_close(Transform().then(c).activation(x)[0], c.activation(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_rotation_is_orthogonal(block: int) -> None:
    k = 64
    for signs in (None, torch.randint(0, 2, (k,)) * 2.0 - 1):
        r = Rotation(block, signs).apply(torch.eye(k, dtype=torch.float64))
        torch.testing.assert_close(r @ r.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-14)
        assert (r != 0).sum() == k * block  # it stays within its blocks
    assert torch.equal(hadamard(block), hadamard(block).T)


blocks = st.sampled_from([1, 2, 8, 16, 64, 512])


def random_rows(data: st.DataObject, k: int, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    x = torch.randn(TOKENS, k, generator=random, dtype=dtype)
    return x * 10.0 ** data.draw(st.integers(-12, 12)) * (torch.rand(k, generator=random) < 0.5)  # also of any size, with zeros


@given(st.data(), blocks, st.sampled_from([1, 3]), st.sampled_from([torch.float32, torch.float64]))
def test_rotation_is_an_involution_that_keeps_norms(data: st.DataObject, block: int, count: int, dtype: torch.dtype) -> None:
    """Each of the log2(block) butterflies rounds once: a few units of the last place of the row's norm."""
    k = block * count
    x, tolerance = random_rows(data, k, dtype), 16 * torch.finfo(dtype).eps
    norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    rotated = Rotation(block).apply(x)
    assert rotated.dtype == dtype
    assert ((Rotation(block).apply(rotated) - x).norm(dim=-1, keepdim=True) <= tolerance * norm).all()
    assert ((rotated.norm(dim=-1, keepdim=True) - norm).abs() <= tolerance * norm).all()


@given(st.data(), blocks, st.booleans())
def test_rotation_is_the_product_with_its_matrix(data: st.DataObject, block: int, with_signs: bool) -> None:
    k = 2 * block
    x = random_rows(data, k, torch.float64)
    signs = torch.randint(0, 2, (k,)) * 2.0 - 1 if with_signs else None
    wanted = (x if signs is None else x * signs).unflatten(-1, (-1, block)) @ hadamard(block)
    got = Rotation(block, signs).apply(x)
    assert (got - wanted.flatten(-2)).norm() <= 1e-14 * x.norm()
    whole = Rotation(block, signs).apply(x.float())
    for row, alone in zip(whole, x.float(), strict=True):
        assert torch.equal(Rotation(block, signs).apply(alone), row)  # whatever else is in the batch
    half = x.clamp(-100, 100).bfloat16()
    assert torch.equal(Rotation(block, signs).apply(half), Rotation(block, signs).apply(half.float()).bfloat16())


def test_rotation_does_not_overflow_on_the_way() -> None:
    """The factor comes first: a sum of 64 large values fits where the result does."""
    x = torch.zeros(64)
    x[:2] = 3e38
    assert Rotation(64).apply(x).isfinite().all()
    assert Rotation(8).apply(torch.full((8,), 3e38)).isinf().any()  # 8.5e38


def test_rotation_refuses() -> None:
    for block in (0, 3, -4, 2.0, "2"):
        with pytest.raises(MethodError, match=str(block)):
            Rotation(block)
    with pytest.raises(MethodError, match="does not divide 6"):
        Rotation(4).apply(torch.zeros(6))


@pytest.mark.parametrize("name", ["shift", "scale", "outliers", "permutation", "rotation"])
def test_nothing_follows_a_rotation(name: str) -> None:
    values = {
        "shift": torch.ones(4),
        "scale": torch.ones(4),
        "outliers": torch.tensor([0]),
        "permutation": torch.arange(4),
        "rotation": Rotation(2),
    }
    with pytest.raises(MethodError, match="nothing may follow a rotation"):
        Transform(rotation=Rotation(4)).then(Transform(**{name: values[name]}))


def test_steps() -> None:
    t = Transform(scale=torch.ones(2), rotation=Rotation(2))
    assert t.steps == ["scale", "rotation"]
    assert t.without("scale").steps == ["rotation"]
    assert t.without("scale", "rotation").is_identity
