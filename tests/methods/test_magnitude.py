"""Magnitude pruning against every possible mask of a group."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods.magnitude import magnitude
from slimfx.methods.masks import NofM, Unstructured, keep
from slimfx.methods.stats import empty_stats


def kept(weight: Tensor, n: int, m: int) -> Tensor:
    """The mask of what stays."""
    return keep(magnitude(weight, empty_stats(weight.shape[1])), NofM(n, m))


def most_energy(weight: Tensor, n: int, m: int) -> float:
    """The largest sum of squares that any n:m mask can keep, by trying all of them."""
    total = 0.0
    for row in weight.double().tolist():
        for start in range(0, len(row), m):
            group = [w * w for w in row[start : start + m]]
            total += max(sum(some) for some in itertools.combinations(group, n))
    return total


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 4), st.data())
def test_no_other_mask_keeps_more_of_the_weight(
    seed: int, N: int, groups: int, data: st.DataObject
) -> None:
    m = data.draw(st.integers(2, 6))
    n = data.draw(st.integers(1, m - 1))
    W = torch.randn(N, groups * m, generator=torch.Generator().manual_seed(seed))
    energy = (W * kept(W, n, m)).double().square().sum().item()
    assert abs(energy - most_energy(W, n, m)) <= 1e-12 * energy


def test_the_sign_does_not_count() -> None:
    W = torch.tensor([[-4.0, 3.0, -2.0, 1.0]])
    assert kept(W, 2, 4).tolist() == [[True, True, False, False]]


def test_a_constant_or_zero_weight_keeps_the_first_n_of_every_m() -> None:
    for value in (0.0, -0.5):
        mask = kept(torch.full((3, 8), value), 1, 4)
        assert mask.int().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0]] * 3


def test_a_zero_column_goes_before_any_other() -> None:
    W = torch.randn(9, 12)
    W[:, 5] = 0
    assert not kept(W, 3, 4)[:, 5].any()


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_of_an_unstructured_share_the_smallest_go(scope: str) -> None:
    W = torch.randn(6, 10) * torch.logspace(-1, 1, 6)[:, None]
    mask = keep(magnitude(W, empty_stats(10)), Unstructured(0.4, scope))
    for row, stays in zip(W, mask) if scope == "row" else [(W, mask)]:
        assert row[stays].abs().min() > row[~stays].abs().max()
        assert stays.sum() == 0.6 * stays.numel()


def test_the_score_is_the_magnitude_itself() -> None:
    W = torch.randn(3, 5)
    assert torch.equal(magnitude(W, empty_stats(5)), W.abs())
