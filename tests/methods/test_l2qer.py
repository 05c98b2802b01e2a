"""L2QER: the smallest error in the norm that the mean magnitudes weigh, and dead inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.bench_solver import error_matrix
from slimfx.methods.l2qer import l2qer
from slimfx.methods.naive_lora import naive_lora
from slimfx.methods.stats import Stats, add_tokens, empty_stats

SHAPES = [(12, 40), (40, 12), (24, 24)]


def correlated(K: int) -> Stats:
    """Statistics of inputs that lie near a few directions, with channels of unequal size."""
    x = torch.randn(200, 4) @ torch.randn(4, K) + 0.1 * torch.randn(200, K)
    return add_tokens(empty_stats(K), x * torch.logspace(-1, 1, K))


def weights(stats: Stats) -> Tensor:
    """mean |x_j| in float64."""
    return stats.abs_sum / stats.tokens


def weighed(E: Tensor, s: Tensor, L: Tensor, R: Tensor) -> float:
    """||(E - R L) S||_F in float64."""
    return ((E.double() - R.double() @ L.double()) * s).norm().item()


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_equals_the_svd_of_the_weighed_error(N: int, K: int, rank: int) -> None:
    E, stats = torch.randn(N, K), correlated(K)
    s = weights(stats)
    U, S, Vh = torch.linalg.svd(E.double() * s, full_matrices=False)
    expected = U[:, :rank] * S[:rank] @ Vh[:rank] / s
    L, R = l2qer(E, stats, rank=rank)
    assert L.shape == (rank, K)
    assert R.shape == (N, rank)
    torch.testing.assert_close((R @ L).double(), expected, rtol=0, atol=2e-3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 8), st.integers(1, 8), st.data())
def test_no_pair_of_its_rank_has_a_smaller_weighed_error(
    seed: int, N: int, K: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(N, K)))
    torch.manual_seed(seed)
    E, x = torch.randn(N, K), torch.randn(9, K) * torch.rand(K)
    stats = add_tokens(empty_stats(K), x)
    s = weights(stats)
    least = torch.linalg.svdvals(E.double() * s)[rank:].norm().item()
    found = weighed(E, s, *l2qer(E, stats, rank=rank))
    assert found <= least * (1 + 1e-4) + 1e-4 * (E * s).norm().item()
    naive = weighed(E, s, *naive_lora(E, stats, rank=rank))
    assert found <= naive * (1 + 1e-4) + 1e-4 * (E * s).norm().item()


@pytest.mark.parametrize("unit", [1e-12, 1e-3, 1e12])
def test_the_unit_of_the_inputs_does_not_matter(unit: float) -> None:
    E, x = torch.randn(12, 20), torch.randn(50, 20) * torch.logspace(-1, 1, 20)
    ordinary = l2qer(E, add_tokens(empty_stats(20), x), rank=3)
    other = l2qer(E, add_tokens(empty_stats(20), x * unit), rank=3)
    torch.testing.assert_close(other[1] @ other[0], ordinary[1] @ ordinary[0], rtol=0, atol=1e-3)


def test_a_dead_input_weighs_as_much_as_the_least_of_the_others() -> None:
    E, x = torch.randn(12, 8), torch.tensor([[3.0, 0.0, 0.5, 2.0, 1.0, 7.0, 0.0, 4.0]])
    filled = torch.where(x == 0, 0.5, x)
    found = l2qer(E, add_tokens(empty_stats(8), x), rank=3)
    expected = l2qer(E, add_tokens(empty_stats(8), filled), rank=3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("least", [0.0, 1e-3, 1e-12, 1e-30])
def test_an_input_that_is_almost_dead_does_not_blow_up_its_column(
    N: int, K: int, least: float
) -> None:
    E, x = torch.randn(N, K), torch.rand(1, K) + 0.1
    x[0, 4] = least
    L, R = l2qer(E, add_tokens(empty_stats(K), x), rank=5)
    assert R.isfinite().all()
    # R has orthonormal columns, so that L = R^T E cannot be longer than E in any column
    assert (L.norm(dim=0) <= E.norm(dim=0) * (1 + 1e-4)).all()


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_inputs_that_are_all_dead_give_naive_lora(N: int, K: int) -> None:
    E, dead = torch.randn(N, K), add_tokens(empty_stats(K), torch.zeros(3, K))
    (L, R), (naive_L, naive_R) = l2qer(E, dead, rank=3), naive_lora(E, dead, rank=3)
    torch.testing.assert_close(R @ L, naive_R @ naive_L, rtol=0, atol=1e-5)


def test_a_zero_error_needs_a_zero_adapter() -> None:
    for N, K in SHAPES:
        L, R = l2qer(torch.zeros(N, K), correlated(K), rank=2)
        assert not (R @ L).any()


@pytest.mark.parametrize("unit", [1e-22, 1e22])
def test_squares_of_the_weights_may_be_out_of_range(unit: float) -> None:
    E, x = torch.randn(12, 20), unit * (torch.rand(50, 20) + 0.1)
    L, R = l2qer(unit * E, add_tokens(empty_stats(20), x), rank=12)
    torch.testing.assert_close(R @ (L / unit), E, rtol=0, atol=1e-3)


def test_the_eigenvectors_are_exact_unless_they_may_be_fast() -> None:
    E, stats = error_matrix(512, 0), add_tokens(empty_stats(512), torch.ones(1, 512))
    exact, fast = (l2qer(E, stats, rank=20, fast=fast)[1] for fast in (False, True))
    assert torch.equal(l2qer(E, stats, rank=20)[1], exact)
    assert not torch.equal(fast, exact)
