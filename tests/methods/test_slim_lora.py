"""SLiM-LoRA: the smallest error in the norm that the inputs weigh, and dead inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.bench_solver import error_matrix
from slimfx.methods.naive_lora import naive_lora
from slimfx.methods.slim_lora import saliency, slim_lora
from slimfx.methods.stats import Stats, add_tokens, empty_stats

SHAPES = [(12, 40), (40, 12), (24, 24)]


def of_means(mean: Tensor) -> Stats:
    """Statistics of one token whose magnitudes are `mean`."""
    return add_tokens(empty_stats(len(mean)), mean[None])


def correlated(K: int) -> Stats:
    """Statistics of inputs that lie near a few directions, with channels of unequal size."""
    x = torch.randn(200, 4) @ torch.randn(4, K) + 0.1 * torch.randn(200, K)
    return add_tokens(empty_stats(K), x * torch.logspace(-1, 1, K))


def weighed(E: Tensor, x: Tensor, L: Tensor, R: Tensor) -> float:
    """||(E - R L) diag(x)||_F in float64."""
    return ((E.double() - R.double() @ L.double()) * x.double()).norm().item()


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_equals_the_svd_of_the_weighed_error(N: int, K: int, rank: int) -> None:
    E, stats = torch.randn(N, K), correlated(K)
    mean = stats.abs_sum / stats.tokens
    x = mean + mean.min()
    U, S, Vh = torch.linalg.svd(E.double() * x, full_matrices=False)
    expected = U[:, :rank] * S[:rank] @ Vh[:rank] / x
    L, R = slim_lora(E, stats, rank=rank)
    # 1e-3 at worst, of an error of order one
    torch.testing.assert_close((R @ L).double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_weighed_error_is_at_most_that_of_naive_lora(N: int, K: int, rank: int) -> None:
    E, stats = torch.randn(N, K), correlated(K)
    x = saliency(stats)
    slim = weighed(E, x, *slim_lora(E, stats, rank=rank))
    naive = weighed(E, x, *naive_lora(E, stats, rank=rank))
    assert slim < 0.95 * naive  # 0.09 to 0.90 of it


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 8), st.integers(1, 8), st.data())
def test_the_weighed_error_is_at_most_that_of_naive_lora_for_any_shape(
    seed: int, N: int, K: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(N, K)))
    torch.manual_seed(seed)
    E, stats = torch.randn(N, K), of_means(torch.rand(K).square())
    x = saliency(stats)
    slim = weighed(E, x, *slim_lora(E, stats, rank=rank))
    naive = weighed(E, x, *naive_lora(E, stats, rank=rank))
    assert slim <= naive * (1 + 1e-4) + 1e-5 * (E * x).norm().item()


def test_the_saliency_is_the_mean_shifted_by_the_smallest_that_is_alive() -> None:
    assert saliency(of_means(torch.tensor([3.0, 0.5, 2.0]))).tolist() == [3.5, 1.0, 2.5]
    assert saliency(of_means(torch.tensor([3.0, 0.0, 2.0]))).tolist() == [5.0, 2.0, 4.0]
    assert saliency(of_means(torch.zeros(3))).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_dead_inputs_leave_the_adapter_finite_and_small(N: int, K: int) -> None:
    E, mean = torch.randn(N, K), torch.rand(K) + 0.1
    mean[::3] = 0
    L, R = slim_lora(E, of_means(mean), rank=5)
    assert R.isfinite().all()
    # R has orthonormal columns, so that L = R^T E cannot be longer than E in any column
    assert (L.norm(dim=0) <= E.norm(dim=0) * (1 + 1e-4)).all()


@pytest.mark.parametrize("least", [1e-3, 1e-6, 1e-12, 1e-30])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_an_input_that_is_almost_dead_does_not_blow_up_its_column(
    N: int, K: int, least: float
) -> None:
    E, mean = torch.randn(N, K), torch.rand(K) + 0.1
    mean[4], mean[5] = least, 0.0
    L, _ = slim_lora(E, of_means(mean), rank=5)
    assert (L.norm(dim=0) <= E.norm(dim=0) * (1 + 1e-4)).all()


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_inputs_that_are_all_dead_give_naive_lora(N: int, K: int) -> None:
    E, dead = torch.randn(N, K), of_means(torch.zeros(K))
    (L, R), (naive_L, naive_R) = slim_lora(E, dead, rank=3), naive_lora(E, dead, rank=3)
    torch.testing.assert_close(R, naive_R, rtol=0, atol=1e-6)
    torch.testing.assert_close(L, naive_L, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_full_rank_leaves_nothing(N: int, K: int) -> None:
    E = torch.randn(N, K)
    L, R = slim_lora(E, correlated(K), rank=min(N, K))
    assert (E - R @ L).norm() <= 1e-4 * E.norm()


def test_a_zero_error_needs_a_zero_adapter() -> None:
    for N, K in SHAPES:
        L, R = slim_lora(torch.zeros(N, K), correlated(K), rank=2)
        assert not (R @ L).any()


def test_the_eigenvectors_are_exact_unless_they_may_be_fast() -> None:
    E, stats = error_matrix(512, 0), add_tokens(empty_stats(512), torch.ones(1, 512))
    exact, fast = (slim_lora(E, stats, rank=20, fast=fast)[1] for fast in (False, True))
    assert torch.equal(slim_lora(E, stats, rank=20)[1], exact)
    assert not torch.equal(fast, exact)
