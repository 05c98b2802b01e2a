"""Adapters against the full covariance: the optimum, and the order of the three compensations."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimfx.methods import COMPENSATORS
from slimfx.methods.covariance import damped
from slimfx.methods.full_lora import full_lora, left_by_rank, low_rank_under
from slimfx.methods.stats import Stats, add_tokens, empty_stats


def watched(K: int, tokens: int = 500) -> Stats:
    x = torch.randn(tokens, K) @ torch.randn(K, K) / K**0.5 * torch.rand(K).exp()
    return add_tokens(empty_stats(K, covariance=True), x)


def under(E: Tensor, H: Tensor) -> float:
    return float(((E.double() @ H.double()) * E.double()).sum())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_reaches_the_optimum_of_the_weighted_svd(shape: tuple[int, int]) -> None:
    E, H = torch.randn(shape), damped(watched(shape[1]).covariance)
    S = torch.linalg.cholesky(H.double())
    left = torch.linalg.svdvals(E.double() @ S)[6:].square().sum().item()
    L, R = low_rank_under(E, H, 6)
    assert under(E - R @ L, H) == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_full_beats_saliency_beats_naive_on_the_outputs(shape: tuple[int, int]) -> None:
    E, stats = torch.randn(shape), watched(shape[1])
    H = damped(stats.covariance)
    errors = {}
    for name in ("naive", "slim-lora", "full"):
        L, R = COMPENSATORS[name](E, stats, rank=5)
        errors[name] = under(E - R @ L, H)
    assert errors["full"] <= errors["slim-lora"] <= errors["naive"]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [0, 1, 12])
def test_any_rank_from_nothing_to_everything(shape: tuple[int, int], rank: int) -> None:
    E, H = torch.randn(shape), damped(watched(shape[1]).covariance)
    L, R = low_rank_under(E, H, rank)
    assert L.shape == (rank, shape[1])
    assert R.shape == (shape[0], rank)
    if rank == 12:
        assert torch.allclose(R @ L, E, atol=1e-3)


def test_a_dead_channel_and_one_token_stay_finite() -> None:
    x = torch.randn(1, 16)
    x[:, 3] = 0
    stats = add_tokens(empty_stats(16, covariance=True), x)
    for error in (torch.randn(8, 16), torch.randn(32, 16), torch.zeros(8, 16), torch.zeros(32, 16)):
        L, R = full_lora(error, stats, rank=4)
        assert L.isfinite().all()
        assert R.isfinite().all()


def test_statistics_without_covariance_are_refused() -> None:
    with pytest.raises(AssertionError, match="without the covariance"):
        full_lora(torch.randn(4, 8), empty_stats(8), rank=1)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_what_is_left_at_every_rank_is_what_the_adapters_leave(shape: tuple[int, int]) -> None:
    E, C, weights = torch.randn(shape), watched(shape[1]).covariance, torch.rand(shape[0])
    H = damped(C) * C.diagonal().mean()
    left = left_by_rank(E, C, weights)
    assert left.shape == (min(shape) + 1,)
    for rank in (0, 1, 7, min(shape)):
        L, R = low_rank_under(E, damped(C), rank) if rank else (E[:0], E[:, :0])
        rest = (E - R @ L).double()
        wanted = float(weights.double() @ ((rest @ H.double()) * rest).sum(1))
        assert left[rank].item() == pytest.approx(wanted, rel=1e-3, abs=1e-5 * left[0].item())


def test_inputs_that_were_always_zero_leave_nothing() -> None:
    left = left_by_rank(torch.randn(6, 4), torch.zeros(4, 4), torch.ones(6))
    assert left.tolist() == [0.0] * 5


@pytest.mark.parametrize(("N", "K"), [(300, 10), (10, 300)])
def test_the_eigenvectors_are_those_of_the_smaller_side(N: int, K: int) -> None:
    E, H = torch.randn(N, K), torch.eye(K)
    small = min(N, K)
    for work in (lambda: low_rank_under(E, H, 2), lambda: left_by_rank(E, H, torch.ones(N))):
        with Sizes() as sizes:
            work()
        assert set(sizes.seen) == {small}


class Sizes(TorchDispatchMode):
    """The sizes of the matrices whose eigenvectors were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._linalg_eigh.default:
            self.seen.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_the_magnitude_of_the_error_does_not_matter(shape: tuple[int, int], unit: float) -> None:
    E, H = torch.randn(shape), damped(watched(shape[1]).covariance)
    ordinary, other = (low_rank_under(each, H, 3) for each in (E, unit * E))
    expected = ordinary[1] @ ordinary[0]
    torch.testing.assert_close(other[1] @ (other[0] / unit), expected, atol=1e-3, rtol=0)


def test_a_large_part_of_one_sign_is_no_less_large() -> None:
    E = -1e25 * torch.rand(6, 8)
    E[0, 0] = 1.0
    L, R = low_rank_under(E, torch.eye(8), 6)
    torch.testing.assert_close(R @ L, E, rtol=1e-3, atol=1e22)


def test_the_exact_eigenvectors_are_the_ones_unless_asked(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    seen: list[bool] = []
    module = importlib.import_module("slimfx.methods.full_lora")
    leading = module.leading_eigenvectors

    def watching(*args, fast, **named):  # type: ignore[no-untyped-def]
        seen.append(fast)
        return leading(*args, fast=fast, **named)

    monkeypatch.setattr(module, "leading_eigenvectors", watching)
    stats = watched(8)
    full_lora(torch.randn(6, 8), stats, rank=1)
    low_rank_under(torch.randn(6, 8), stats.covariance, 1)
    full_lora(torch.randn(6, 8), stats, rank=1, fast=True)
    assert seen == [False, False, True]
