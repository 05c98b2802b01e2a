"""Sums over tokens against loops in float64, however the tokens are cut into calls."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods.stats import Stats, add_tokens, empty_stats, merge, unreached_stats

PARTS = ("abs_sum", "square_sum", "peak", "value_sum")


def reference(x: Tensor) -> dict[str, list[float]]:
    """The sums of each column, value by value."""
    columns = [[v.item() for v in column] for column in x.double().T]
    return {
        "abs_sum": [sum(abs(v) for v in column) for column in columns],
        "square_sum": [sum(v * v for v in column) for column in columns],
        "peak": [max((abs(v) for v in column), default=0.0) for column in columns],
        "value_sum": [sum(column) for column in columns],
    }


def assert_same(stats: Stats, x: Tensor) -> None:
    """Each sum within float32 rounding of the reference, and of float64 type."""
    assert stats.tokens == len(x)
    for part, expected in reference(x).items():
        found = getattr(stats, part)
        assert found.dtype == torch.float64
        atol = 1e-5 if part == "value_sum" else 1e-30  # only there do signs cancel
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=atol)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 999),
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(1, 7),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_the_loop_over_all_tokens_however_they_are_cut(
    seed: int, cuts: list[int], K: int, dtype: torch.dtype
) -> None:
    x = torch.randn(sum(cuts), K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    stats = empty_stats(K)
    for part in x.split(cuts):
        stats = add_tokens(stats, part)
    assert_same(stats, x)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(0, 5), st.integers(0, 5))
def test_a_merge_is_the_statistics_of_both_together(seed: int, one: int, two: int) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(one, 3), torch.randn(two, 3)
    both = merge(add_tokens(empty_stats(3), a), add_tokens(empty_stats(3), b))
    assert_same(both, torch.cat([a, b]))


def test_the_mean_is_at_most_the_rms_and_the_rms_at_most_the_peak() -> None:
    stats = add_tokens(empty_stats(11), torch.randn(40, 11) * torch.logspace(-6, 6, 11))
    assert (stats.mean_abs < stats.rms).all()
    assert (stats.rms < stats.peak).all()


def test_of_one_token_mean_rms_and_peak_are_the_token() -> None:
    stats = add_tokens(empty_stats(3), torch.tensor([[1.5, -2.0, 0.0]]))
    expected = torch.tensor([1.5, 2.0, 0.0])
    assert torch.equal(stats.mean_abs, expected)
    assert torch.equal(stats.rms, expected)
    assert torch.equal(stats.peak, expected.double())
    assert stats.mean.tolist() == [1.5, -2.0, 0.0]
    assert stats.dead.tolist() == [False, False, True]


def test_no_token_at_all_has_mean_and_rms_zero() -> None:
    stats = empty_stats(4)
    assert stats.tokens == 0
    assert stats.mean_abs.tolist() == stats.rms.tolist() == stats.peak.tolist() == [0.0] * 4


def test_many_calls_lose_nothing_to_rounding() -> None:
    stats = empty_stats(1)
    for value in (1e8, *[1.0] * 100):  # in float32 the ones would vanish
        stats = add_tokens(stats, torch.tensor([[value]]))
    assert stats.abs_sum.item() == 1e8 + 100


@pytest.mark.parametrize("part", PARTS)
def test_adding_tokens_leaves_the_earlier_statistics_as_they_were(part: str) -> None:
    first = add_tokens(empty_stats(2), torch.ones(1, 2))
    before = getattr(first, part).clone()
    add_tokens(first, torch.full((5, 2), 9.0))
    assert torch.equal(getattr(first, part), before)


def test_the_mean_keeps_its_sign() -> None:
    stats = add_tokens(empty_stats(2), torch.tensor([[1.0, -4.0], [-3.0, 2.0]]))
    assert stats.mean.tolist() == [-1.0, -1.0]
    assert stats.mean_abs.tolist() == [2.0, 3.0]


def test_a_channel_is_dead_until_one_token_is_not_zero() -> None:
    stats = add_tokens(empty_stats(3), torch.tensor([[0.0, 0.0, 1.0]]))
    assert stats.dead.tolist() == [True, True, False]
    stats = add_tokens(stats, torch.tensor([[0.0, -1e-30, 0.0]]))
    assert stats.dead.tolist() == [True, False, False]
    assert empty_stats(2).dead.all()


@pytest.mark.parametrize("covariance", [False, True])
def test_scaled_statistics_are_those_of_the_scaled_inputs(covariance: bool) -> None:
    x, c = torch.randn(30, 5), torch.tensor([1.0, -0.5, 3.0, 0.0, 1e-3])
    found = add_tokens(empty_stats(5, covariance=covariance), x).scaled(c)
    expected = add_tokens(empty_stats(5, covariance=covariance), x * c)
    assert found.tokens == 30
    for part in PARTS:
        torch.testing.assert_close(
            getattr(found, part), getattr(expected, part), rtol=1e-5, atol=1e-6
        )
    if covariance:
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-5, atol=1e-6)
    else:
        assert found.product_sum is None


def test_the_covariance_is_the_mean_of_the_outer_products() -> None:
    x = torch.randn(40, 6)
    stats = empty_stats(6, covariance=True)
    for part in x.split(7):
        stats = add_tokens(stats, part)
    expected = sum(torch.outer(row, row) for row in x.double()) / 40
    torch.testing.assert_close(stats.covariance.double(), expected, rtol=1e-5, atol=1e-6)


def test_centred_the_covariance_is_about_the_mean() -> None:
    x = torch.randn(50, 6) + torch.arange(6.0)
    stats = add_tokens(empty_stats(6, covariance=True), x)
    expected = torch.cov(x.double().T, correction=0).float()
    torch.testing.assert_close(stats.centred().covariance, expected, rtol=1e-4, atol=1e-4)
    without = add_tokens(empty_stats(6), x)
    assert without.product_sum is None
    assert without.centred() is without
    nothing = empty_stats(6, covariance=True).centred().covariance
    assert torch.equal(nothing, torch.zeros(6, 6))


def test_one_token_has_itself_for_a_covariance() -> None:
    x = torch.tensor([[1.0, 2.0]])
    stats = add_tokens(empty_stats(2, covariance=True), x)
    assert torch.equal(stats.covariance, x.T @ x)
    assert not stats.centred().covariance.any()


def test_an_input_that_was_not_reached_matters_in_every_channel_alike() -> None:
    stats = unreached_stats(empty_stats(3, covariance=True))
    assert stats.tokens == 0
    assert torch.equal(stats.covariance, torch.eye(3))
    assert stats.rms.tolist() == stats.mean_abs.tolist() == [1, 1, 1]
    assert unreached_stats(empty_stats(3)).product_sum is None


def test_taken_together_is_as_if_all_tokens_had_been_added() -> None:
    x, y = torch.randn(5, 4), torch.randn(3, 4)
    for covariance in (True, False):
        start = empty_stats(4, covariance=covariance)
        both = merge(add_tokens(start, x), add_tokens(start, y))
        whole = add_tokens(add_tokens(start, x), y)
        for name, found in vars(both).items():
            torch.testing.assert_close(found, vars(whole)[name])
    mixed = merge(add_tokens(empty_stats(4, covariance=True), x), add_tokens(empty_stats(4), y))
    assert mixed.product_sum is None
    mixed = merge(add_tokens(empty_stats(4), y), add_tokens(empty_stats(4, covariance=True), x))
    assert mixed.product_sum is None
