"""The best rank-r factors: their residual is that of torch.linalg.svd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slimfx.bench_solver import error_matrix
from slimfx.methods.low_rank import low_rank, low_rank_weighed

SHAPES = [(12, 40), (40, 12), (24, 24)]


def residual(E: Tensor, rank: int) -> float:
    """||E - R L||_F as it came out, in float64."""
    L, R = low_rank(E, rank)
    assert L.shape == (rank, E.shape[1])
    assert R.shape == (E.shape[0], rank)
    return (E.double() - R.double() @ L.double()).norm().item()


def optimum(E: Tensor, rank: int) -> float:
    """The root of the sum of the squares of the singular values left out."""
    return torch.linalg.svd(E.double()).S[rank:].norm().item()


def with_spectrum(N: int, K: int, decay: float) -> Tensor:
    """A matrix with singular values 1, decay, decay^2, ..."""
    r = min(N, K)
    U, V = torch.linalg.qr(torch.randn(N, r)).Q, torch.linalg.qr(torch.randn(K, r)).Q
    return U * decay ** torch.arange(r) @ V.T


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 7, 11])
def test_the_residual_is_the_smallest_there_is(N: int, K: int, rank: int) -> None:
    E = torch.randn(N, K)
    assert residual(E, rank) <= optimum(E, rank) * (1 + 1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 9), st.data())
def test_the_residual_is_the_smallest_for_any_shape_and_rank(
    seed: int, N: int, K: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(N, K)))
    E = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    assert residual(E, rank) <= optimum(E, rank) * (1 + 1e-4) + 1e-5 * E.norm().item()


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_product_is_the_truncated_svd(N: int, K: int) -> None:
    E = with_spectrum(N, K, 0.7)
    U, S, Vh = torch.linalg.svd(E.double(), full_matrices=False)
    L, R = low_rank(E, 3)
    torch.testing.assert_close((R @ L).double(), U[:, :3] * S[:3] @ Vh[:3], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_full_rank_leaves_nothing(N: int, K: int) -> None:
    E = torch.randn(N, K)
    assert residual(E, min(N, K)) <= 1e-5 * E.norm().item()


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("rank", [2, 3, 8])
def test_a_rank_deficient_matrix_gives_finite_factors(N: int, K: int, rank: int) -> None:
    E = torch.randn(N, 3) @ torch.randn(3, K)
    L, R = low_rank(E, rank)
    assert L.isfinite().all()
    assert R.isfinite().all()
    assert residual(E, rank) <= optimum(E, rank) * (1 + 1e-4) + 1e-5 * E.norm().item()


@pytest.mark.parametrize(("N", "K"), [*SHAPES, (1, 5), (5, 1), (1, 1)])
def test_a_zero_matrix_gives_a_zero_product(N: int, K: int) -> None:
    L, R = low_rank(torch.zeros(N, K), 1)
    assert R.isfinite().all()
    assert not (R @ L).any()


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_columns_of_r_are_orthonormal(N: int, K: int) -> None:
    _, R = low_rank(torch.randn(N, K), 5)
    torch.testing.assert_close(R.T @ R, torch.eye(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_rows_of_l_have_the_singular_values_as_lengths(N: int, K: int) -> None:
    E = with_spectrum(N, K, 0.7)
    L, _ = low_rank(E, 4)
    assert L.norm(dim=1).tolist() == pytest.approx([0.7**i for i in range(4)], rel=1e-4)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_a_steep_spectrum_costs_no_more_than_the_root_of_the_float32_rounding(
    N: int, K: int
) -> None:
    E = with_spectrum(N, K, 0.1)
    # singular values below 3e-4 of the largest drown in the Gram matrix: 1e-4 seen, 1e-5 possible
    assert residual(E, 5) <= optimum(E, 5) + torch.finfo(torch.float32).eps ** 0.5


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12, 1e25])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_magnitude_of_the_matrix_does_not_matter(N: int, K: int, factor: float) -> None:
    E = torch.randn(N, K) * factor
    assert residual(E, 5) <= optimum(E, 5) * (1 + 1e-4)


@pytest.mark.parametrize(("N", "K"), [(300, 10), (10, 300)])
def test_works_on_the_smaller_side(N: int, K: int) -> None:
    E = torch.randn(N, K)
    with FlopCounterMode(display=False) as flops:
        low_rank(E, 4)
    # the Gram matrix of the smaller side, one product with it, and at most one with r x r numbers
    assert flops.get_total_flops() <= 2 * N * K * (10 + 4) + 2 * 4 * 4 * K


def test_gives_the_same_bits_twice() -> None:
    E = torch.randn(17, 23)
    for one, two in zip(low_rank(E, 4), low_rank(E, 4)):
        assert torch.equal(one, two)


@pytest.mark.parametrize(("rows", "columns"), [(512, 768), (768, 512)])
def test_fast_is_within_half_a_percent_of_the_optimum(rows: int, columns: int) -> None:
    E = error_matrix(768, 0)[:rows, :columns]
    L, R = low_rank(E, 51, fast=True)
    torch.testing.assert_close(R.T @ R, torch.eye(51), rtol=0, atol=2e-5)
    best = torch.linalg.svdvals(E.double())[51:].square().sum().item()
    left = (E.double() - R.double() @ L.double()).square().sum().item()
    assert left <= 1.005 * best  # 1.001 to 1.003 seen
    assert not torch.equal(R, low_rank(E, 51)[1])


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_fast_takes_any_magnitude(factor: float) -> None:
    E = error_matrix(512, 0)
    one, many = low_rank(E, 20, fast=True), low_rank(E * factor, 20, fast=True)
    torch.testing.assert_close(many[1] @ (many[0] / factor), one[1] @ one[0], rtol=0, atol=1e-3)


def test_fast_gives_zero_factors_for_a_zero_matrix() -> None:
    L, R = low_rank(torch.zeros(512, 520), 20, fast=True)
    assert R.isfinite().all()
    assert not L.any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_values_of_one_sign_take_any_magnitude(sign: int, factor: float) -> None:
    E = sign * factor * (1 + torch.rand(12, 20))
    assert residual(E, 5) <= optimum(E, 5) * (1 + 1e-4)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_weighed_it_is_the_svd_of_the_weighed_matrix(N: int, K: int) -> None:
    E, weights = torch.randn(N, K), torch.rand(K) + 0.1
    least = torch.linalg.svdvals(E.double() * weights)[4:].norm().item()
    L, R = low_rank_weighed(E, weights, 4)
    assert ((E - R @ L) * weights).norm().item() == pytest.approx(least, rel=1e-4)


def test_weighed_it_is_exact_unless_it_may_be_fast() -> None:
    E, weights = error_matrix(512, 0), torch.ones(512)
    exact, fast = (low_rank_weighed(E, weights, 20, fast=fast)[1] for fast in (False, True))
    assert torch.equal(low_rank_weighed(E, weights, 20)[1], exact)
    assert not torch.equal(fast, exact)
