"""Magnitude pruning against every possible mask of a group."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods.magnitude import magnitude
from slimfx.methods.stats import empty_stats


def most_energy(weight: Tensor, n: int, m: int) -> float:
    """The largest sum of squares that any n:m mask can keep, by trying all of them."""
    total = 0.0
    for row in weight.double().tolist():
        for start in range(0, len(row), m):
            group = [w * w for w in row[start : start + m]]
            total += max(sum(kept) for kept in itertools.combinations(group, n))
    return total


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 4), st.data())
def test_no_other_mask_keeps_more_of_the_weight(
    seed: int, N: int, groups: int, data: st.DataObject
) -> None:
    m = data.draw(st.integers(2, 6))
    n = data.draw(st.integers(1, m - 1))
    W = torch.randn(N, groups * m, generator=torch.Generator().manual_seed(seed))
    kept = (W * magnitude(W, empty_stats(groups * m), n=n, m=m)).double().square().sum().item()
    assert abs(kept - most_energy(W, n, m)) <= 1e-12 * kept


def test_the_sign_does_not_count() -> None:
    W = torch.tensor([[-4.0, 3.0, -2.0, 1.0]])
    assert magnitude(W, empty_stats(4), n=2, m=4).tolist() == [[True, True, False, False]]


def test_a_constant_or_zero_weight_keeps_the_first_n_of_every_m() -> None:
    for value in (0.0, -0.5):
        mask = magnitude(torch.full((3, 8), value), empty_stats(8), n=1, m=4)
        assert mask.int().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0]] * 3


def test_a_zero_column_goes_before_any_other() -> None:
    W = torch.randn(9, 12)
    W[:, 5] = 0
    assert not magnitude(W, empty_stats(12), n=3, m=4)[:, 5].any()
