"""Naive low rank: the smallest Frobenius error of all pairs of its rank."""

import itertools

import pytest
import torch
from torch import Tensor

from slimfx.methods.naive_lora import naive_lora
from slimfx.methods.slim_lora import slim_lora
from slimfx.methods.stats import Stats, add_tokens, empty_stats


def correlated(K: int) -> Stats:
    """Statistics of inputs that lie near a few directions, with channels of unequal size."""
    x = torch.randn(200, 4) @ torch.randn(4, K) + 0.1 * torch.randn(200, K)
    return add_tokens(empty_stats(K), x * torch.logspace(-1, 1, K))


def frobenius(E: Tensor, L: Tensor, R: Tensor) -> float:
    """||E - R L||_F in float64."""
    return (E.double() - R.double() @ L.double()).norm().item()


@pytest.mark.parametrize(("N", "K"), [(12, 40), (40, 12), (24, 24)])
def test_the_error_is_that_of_the_truncated_svd(N: int, K: int) -> None:
    E = torch.randn(N, K)
    best = torch.linalg.svdvals(E.double())[4:].norm().item()
    assert frobenius(E, *naive_lora(E, empty_stats(K), rank=4)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("N", "K"), [(12, 40), (40, 12), (24, 24)])
@pytest.mark.parametrize("rank", [1, 6, 12])
def test_the_frobenius_error_is_at_most_that_of_slim_lora(N: int, K: int, rank: int) -> None:
    E, stats = torch.randn(N, K), correlated(K)
    naive = frobenius(E, *naive_lora(E, stats, rank=rank))
    slim = frobenius(E, *slim_lora(E, stats, rank=rank))
    assert naive <= slim * (1 + 1e-5) + 1e-5 * E.norm().item()


def test_the_inputs_are_not_looked_at() -> None:
    E = torch.randn(8, 20)
    one = naive_lora(E, empty_stats(20), rank=3)
    two = naive_lora(E, correlated(20), rank=3)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_every_further_rank_lowers_the_error() -> None:
    E = torch.randn(9, 14)
    errors = [frobenius(E, *naive_lora(E, empty_stats(14), rank=r)) for r in range(1, 10)]
    assert all(more > 1.01 * less for more, less in itertools.pairwise(errors))
    assert errors[-1] <= 1e-5 * E.norm().item()


def test_a_zero_error_needs_a_zero_adapter() -> None:
    L, R = naive_lora(torch.zeros(6, 4), empty_stats(4), rank=2)
    assert not (R @ L).any()
