"""Leading eigenvectors: exact beside float64, fast within half a percent of what is left."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slimfx.bench_solver import error_matrix
from slimfx.methods import eigenvectors
from slimfx.methods.eigenvectors import leading_eigenvectors

N = 512
"""The smallest size that the fast mode takes."""


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Products in either precision, whatever this machine is good at."""
    monkeypatch.setattr(eigenvectors, "_has_bfloat16", lambda device: request.param)
    return request.param


def with_spectrum(S: Tensor, seed: int = 0) -> Tensor:
    """A square matrix with these singular values."""
    draw = torch.Generator().manual_seed(seed)
    n = len(S)
    U = torch.linalg.qr(torch.randn(n, n, generator=draw)).Q
    V = torch.linalg.qr(torch.randn(n, n, generator=draw)).Q
    return U * S @ V.T


def excess(E: Tensor, U: Tensor) -> float:
    """||E - U U^T E||^2 above the best there is, in shares of the best; rounding is forgiven."""
    energies = torch.linalg.svdvals(E.double()).square()
    best, total = energies[U.shape[1] :].sum().item(), energies.sum().item()
    left = (E.double() - U.double() @ (U.double().T @ E.double())).square().sum().item()
    return max(left - best - 4e-6 * total, 0) / max(best, 1e-6 * total, 1e-30)


def assert_orthonormal(U: Tensor) -> None:
    torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1]).to(U), rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", [1, 24, 600])
def test_exact_is_the_eigenbasis_of_the_product(n: int) -> None:
    E = with_spectrum(0.8 ** torch.arange(n).clamp(max=20))
    rank = min(n, 5)
    expected = torch.linalg.svd(E.double()).U[:, :rank]
    for H in (None, torch.eye(n)):
        cosines = (leading_eigenvectors(E, rank, H=H).T.double() @ expected).abs()
        torch.testing.assert_close(cosines, torch.eye(rank).double(), rtol=0, atol=1e-4)


def test_the_product_goes_from_left_to_right() -> None:
    E, H = torch.randn(12, 20), torch.randn(20, 20)
    H = H @ H.T
    expected = torch.linalg.eigh((E @ H @ E.T).double()).eigenvectors[:, -1]
    U = leading_eigenvectors(E, 1, H=H)
    assert abs(U[:, 0].double() @ expected) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 8, 51])
def test_fast_is_within_half_a_percent_on_the_error_of_a_compressed_weight(
    bfloat16: bool, rank: int
) -> None:
    E = error_matrix(N, 0)
    U = leading_eigenvectors(E, rank, fast=True)
    assert_orthonormal(U)
    assert not torch.equal(U, leading_eigenvectors(E, rank))
    assert 0 <= excess(E, U) <= 0.005


def test_fast_multiplies_few_columns_for_each_it_returns() -> None:
    E = error_matrix(4 * N, 0)[:N]
    with FlopCounterMode(display=False) as flops:
        leading_eigenvectors(E, 51, fast=True)
    # 3.5 times the rank for products, 0.3 for the trace, 0.2 to stay orthogonal; 4.03 in all
    assert flops.get_total_flops() <= 4 * E.numel() * 51 * 4.1


def test_fast_takes_a_covariance_as_it_is() -> None:
    E = error_matrix(N, 0)
    x = torch.randn(700, N) * torch.rand(N).exp()
    H = x.T @ x / 700
    U = leading_eigenvectors(E, 40, H=H, fast=True)
    assert excess(E @ torch.linalg.cholesky(H), U) <= 0.005


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.floats(0, 2.5), st.integers(1, N // 8), st.booleans(), st.integers(0, 99))
def test_fast_is_within_half_a_percent_on_any_power_law(
    decay: float, rank: int, bfloat16: bool, seed: int
) -> None:
    E = with_spectrum(torch.arange(1, N + 1) ** -decay, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eigenvectors, "_has_bfloat16", lambda device: bfloat16)
        U = leading_eigenvectors(E, rank, fast=True)
    assert_orthonormal(U)
    assert excess(E, U) <= 0.005


@pytest.mark.parametrize(("n", "rank"), [(N, 30), (1024, 16), (1024, 102)])
def test_without_fast_lanczos_ends_at_the_optimum(n: int, rank: int) -> None:
    E = error_matrix(n, 0)
    U = leading_eigenvectors(E, rank)
    assert not torch.equal(U, eigenvectors._whole((E, E.T), rank))
    assert_orthonormal(U)
    assert excess(E, U) <= 1e-4  # 2e-6 to 4e-5 seen


def test_fast_puts_the_largest_first(bfloat16: bool) -> None:
    E = with_spectrum(torch.linspace(2, 1, N))
    U = leading_eigenvectors(E, 20, fast=True)
    energies = (U.T @ E).square().sum(1)
    assert (energies.diff() < 1e-2).all()
    assert energies[0] > energies[-1] + 0.05


@pytest.mark.parametrize(
    "S",
    [
        pytest.param(torch.zeros(N), id="zero"),
        pytest.param(torch.ones(N), id="identity"),
        pytest.param((torch.arange(N) < 3).float(), id="rank 3"),
        pytest.param((torch.arange(N) < 100).float(), id="more equal values than a block has"),
        pytest.param(1 - 0.5 * (torch.arange(N) >= 45).float(), id="two steps"),
        pytest.param(1e3 * (torch.arange(N) < 1) + torch.ones(N), id="one outlier"),
    ],
)
def test_fast_survives_what_ends_the_krylov_space_early(bfloat16: bool, S: Tensor) -> None:
    E = with_spectrum(S)
    U = leading_eigenvectors(E, 40, fast=True)
    assert U.isfinite().all()
    assert_orthonormal(U)
    assert excess(E, U) <= 0.005
    assert not torch.equal(U, eigenvectors._whole((E, E.T), 40))  # it has not fallen back


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_magnitude_does_not_matter_to_fast(bfloat16: bool, factor: float) -> None:
    E = error_matrix(N, 0)
    U = leading_eigenvectors(E * factor**0.5, 30, fast=True)
    assert_orthonormal(U)
    assert excess(E, U) <= 0.005


def test_fast_in_float64_stays_there() -> None:
    E = error_matrix(N, 0).double()
    U = leading_eigenvectors(E, 30, fast=True)
    torch.testing.assert_close(U.T @ U, torch.eye(30).double(), rtol=0, atol=1e-12)
    assert excess(E, U) <= 0.005


@pytest.mark.parametrize(
    ("n", "rank"),
    [
        pytest.param(N - 4, 20, id="small"),
        pytest.param(N, N // 8 + 1, id="high rank"),
        pytest.param(N, 0, id="rank 0"),
    ],
)
def test_fast_is_exact_where_it_would_not_pay(n: int, rank: int) -> None:
    E = error_matrix(n, 0)
    U = leading_eigenvectors(E, rank, fast=True)
    assert U.shape == (n, rank)
    assert torch.equal(U, eigenvectors._whole((E, E.T), rank))


def test_no_end_in_half_the_space_means_the_whole_solver(
    bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eigenvectors, "_LATER_BLOCKS", 1e6)
    E = error_matrix(N, 0)
    assert torch.equal(leading_eigenvectors(E, 60, fast=True), eigenvectors._whole((E, E.T), 60))


@pytest.mark.parametrize("rank", [16, 64])
def test_fast_on_energies_that_fall_to_zero_in_a_straight_line(bfloat16: bool, rank: int) -> None:
    E = with_spectrum(torch.linspace(1, 0, N).sqrt())
    assert excess(E, leading_eigenvectors(E, rank, fast=True)) <= 0.008  # 0.004 to 0.007 seen


def test_a_steep_spectrum_is_left_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigenvectors, "_has_bfloat16", lambda device: True)
    E = with_spectrum(torch.arange(1, N + 1) ** -2.0)
    U = leading_eigenvectors(E, 10, fast=True)
    monkeypatch.setattr(eigenvectors, "_has_bfloat16", lambda device: False)
    assert torch.equal(U, leading_eigenvectors(E, 10, fast=True))


def test_fast_repeats_itself_and_leaves_the_random_state_and_its_argument_alone() -> None:
    E = error_matrix(N, 0)
    kept, state = E.clone(), torch.get_rng_state()
    one, two = (leading_eigenvectors(E, 30, fast=True) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(E, kept)


@pytest.mark.parametrize(
    ("n", "K", "rank", "pays"),
    [(N, 40, 64, True), (N, 40, 1, True), (N, 40, 65, False), (N - 1, 600, 8, False)],
)
def test_lanczos_is_for_many_rows_and_an_eighth_of_them_at_most(
    n: int, K: int, rank: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(
        eigenvectors, "_block_lanczos", lambda factors, rank, **how: tried.append(rank)
    )
    leading_eigenvectors(torch.randn(n, K), rank)
    assert tried == ([rank] if pays else [])


@pytest.mark.parametrize("reach", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("share", "new"), [(0.5, True), (1e-3, False)])
def test_noise_fills_only_what_has_nothing_new(reach: float, share: float, new: bool) -> None:
    Q = torch.linalg.qr(torch.randn(60, 8)).Q
    V = torch.randn(60, 4)
    V = V - Q @ (Q.T @ V)
    V = share * reach * torch.linalg.qr(V).Q
    draw = torch.Generator().manual_seed(1)
    before = draw.get_state()
    found = eigenvectors._orthonormal(V, Q, torch.tensor(reach), draw)
    assert torch.equal(draw.get_state(), before) == new
    assert_orthonormal(torch.cat([Q, found], 1))
    assert_orthonormal(torch.cat([Q, eigenvectors._orthonormal(0 * V, Q, 0 * V.max(), draw)], 1))


def test_a_device_without_such_instructions_multiplies_no_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert eigenvectors._has_bfloat16(torch.device("cpu"))
    assert not eigenvectors._has_bfloat16(torch.device("meta"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert eigenvectors._has_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not eigenvectors._has_bfloat16(torch.device("cpu"))
