"""Adapters against the full covariance: the optimum, and the order of the three compensations."""

import pytest
import torch
from torch import Tensor

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
