"""Statistics are monoids, survive transforms, and stay small."""

import pytest
import torch
from helpers import assert_same, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantkit import MethodError, Range, Rotation, Statistic, TokenSample, Transform

K = 6
KEPT = TokenSample.size + TokenSample.extremes


def collected(kind: type, *parts: Tensor, seed: int = 0) -> Statistic:
    statistic = kind(K, seed=seed)
    for part in parts:
        statistic.update(part)
    return statistic


def heavy(n: int, seed: int = 0) -> Tensor:
    """Tokens of very different size."""
    return normal(n, K, seed=seed) * normal(n, 1, seed=seed + 1).mul(2).exp()


def sorted_rows(x: Tensor) -> Tensor:
    return torch.tensor(sorted(x.tolist()))


splits = st.lists(st.integers(0, 400), min_size=1, max_size=5)


@given(splits, st.integers(0, 99))
def test_ranges_of_parts_make_the_whole(lengths: list[int], seed: int) -> None:
    x = heavy(sum(lengths), seed)
    whole, parts = collected(Range, x), [collected(Range, p) for p in x.split(lengths)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    for other in (merged, collected(Range, *x.split(lengths)), whole.merge(Range(K)), Range(K).merge(whole)):
        assert_same(other.tensors(), whole.tensors())
    assert_same(whole.absmax, x.abs().amax(0) if len(x) else torch.zeros(K))


@given(splits, st.integers(0, 99))
def test_samples_of_parts_count_as_the_whole(lengths: list[int], seed: int) -> None:
    """Weights sum to what was seen, and the largest tokens are never missed, however the data is cut."""
    x = heavy(sum(lengths), seed)
    parts = x.split(lengths)
    merged = collected(TokenSample, parts[0])
    for i, part in enumerate(parts[1:]):
        merged = merged.merge(collected(TokenSample, part, seed=i + 1))
    for sample in (collected(TokenSample, x), collected(TokenSample, *parts), merged):
        tokens, weights = sample.weighted()
        assert len(tokens) == len(weights) == min(len(x), KEPT)
        assert sample.seen == len(x)
        assert float(weights.double().sum()) == pytest.approx(len(x), rel=2.0**-24)
        assert (weights >= 1).all()
        assert_same(sample.rare.abs().amax(1), x.abs().amax(1).sort(descending=True).values[: TokenSample.extremes])
        assert {tuple(row) for row in tokens.tolist()} <= {tuple(row) for row in x.tolist()}
        if len(x) <= KEPT:
            assert_same(sorted_rows(tokens), sorted_rows(x))


def test_a_sample_is_fair() -> None:
    """Each common token is as likely as any other: the kept share of the first half is binomial (4 sigma)."""
    n, kept = 2000, []
    for seed in range(20):
        x = torch.arange(1, n + 1.0)[:, None].expand(n, K) / n  # the largest 64 are extremes
        sample = TokenSample(K, seed=seed)
        for part in x.split(137):
            sample.update(part)
        kept.append(sample.common[:, 0])
    low = (torch.cat(kept) <= (n - 64) / 2 / n).float()
    assert abs(float(low.mean()) - 0.5) < 4 * 0.5 / len(low) ** 0.5


transforms = st.builds(
    lambda shift, scale, permutation, outliers: Transform(
        shift=normal(K, seed=1) if shift else None,
        scale=normal(K, seed=2).exp() if scale else None,
        permutation=torch.randperm(K, generator=torch.Generator().manual_seed(3)) if permutation else None,
        outliers=torch.tensor([1, 4]) if outliers else None,
    ),
    *[st.booleans()] * 4,
)


@given(transforms, st.integers(1, KEPT))
def test_after_equals_collecting_again(transform: Transform, n: int) -> None:
    """Exactly: rounding is monotone, so it commutes with minima, and a sample this small keeps every token."""
    x = heavy(n)
    again = transform.activation(x)[0]
    assert_same(collected(Range, x).after(transform).tensors(), collected(Range, again).tensors())
    sample = collected(TokenSample, x).after(transform)
    assert_same(sorted_rows(sample.weighted()[0]), sorted_rows(again))
    assert sample.seen == n


def test_rotations() -> None:
    rotation = Transform(rotation=Rotation(2))
    x = heavy(100)
    with pytest.raises(MethodError, match="rotation"):
        collected(Range, x).after(rotation)
    got = sorted_rows(collected(TokenSample, x).after(rotation).weighted()[0])
    torch.testing.assert_close(got, sorted_rows(rotation.activation(x)[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_is_bounded(dtype: torch.dtype) -> None:
    """Numbers and the storages behind them, whatever the amount of data; nothing keeps a batch alive."""
    for kind, rows in ((Range, 2), (TokenSample, KEPT)):
        statistic = kind(K)
        for seed in range(20):
            statistic.update(heavy(1500, seed).to(dtype))
        stored = [t for name, t in statistic.tensors().items() if name not in ("keys", "seen")]
        assert sum(t.untyped_storage().nbytes() for t in stored) <= 4 * rows * K
        assert isinstance(statistic, Statistic)
        if kind is TokenSample:
            assert statistic.rare.dtype == statistic.common.dtype == dtype
