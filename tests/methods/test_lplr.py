"""Factors in few bits: better than rounding the optimum, and safe where it has no full rank."""

import pytest
import torch
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.covariance import damped
from slimfx.methods.full_lora import low_rank_under
from slimfx.methods.lplr import lplr
from slimfx.methods.quantized import Quantized, as_float, quantize
from slimfx.methods.stats import Stats, add_tokens, empty_stats


def watched(K: int, tokens: int = 500) -> Stats:
    x = torch.randn(tokens, K) @ torch.randn(K, K) / K**0.5 * torch.rand(K).exp()
    return add_tokens(empty_stats(K, covariance=True), x)


def rounded(matrix: Tensor) -> Quantized:
    scale = absmax(matrix, bits=4, granularity="group", group=16)
    return quantize(matrix, scale, group=16, bits=4)


def under(E: Tensor, H: Tensor) -> float:
    return float(((E.double() @ H.double()) * E.double()).sum())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_is_better_than_rounding_the_optimum(shape: tuple[int, int]) -> None:
    low, noise = torch.randn(shape[0], 6) @ torch.randn(6, shape[1]), torch.randn(shape)
    E, stats = low + 0.3 * noise, watched(shape[1])
    H = damped(stats.covariance)
    optimum = low_rank_under(E, H, 6)
    L, R = (as_float(rounded(part)) for part in optimum)
    found_L, found_R = lplr(E, stats, rank=6, store=rounded)
    assert isinstance(found_L, Quantized)
    best = under(E - optimum[1] @ optimum[0], H)
    found = under(E - as_float(found_R) @ as_float(found_L), H)
    assert found - best < 0.8 * (under(E - R @ L, H) - best)


def test_without_rounding_it_is_the_optimum() -> None:
    E, stats = torch.randn(24, 40), watched(40)
    H = damped(stats.covariance)
    L, R = low_rank_under(E, H, 5)
    found_L, found_R = lplr(E, stats, rank=5, store=lambda matrix: matrix)
    found = under(E - as_float(found_R) @ as_float(found_L), H)
    assert found == pytest.approx(under(E - R @ L, H), rel=1e-4)


@pytest.mark.parametrize("error", ["zero", "rank one", "zero rows"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_an_error_of_lower_rank_stays_finite(error: str, tokens: int) -> None:
    E = {
        "zero": torch.zeros(8, 32),
        "rank one": torch.ones(8, 1) * torch.randn(32),
        "zero rows": torch.randn(8, 32) * (torch.arange(8) < 2)[:, None],
    }[error]
    L, R = lplr(E, watched(32, tokens), rank=4, store=rounded)
    assert as_float(L).isfinite().all()
    assert as_float(R).isfinite().all()
    H = damped(watched(32, tokens).covariance)
    assert under(E - as_float(R) @ as_float(L), H) <= under(E, H)


def test_it_is_two_rounds_of_the_two_closed_forms() -> None:
    E, stats = torch.randn(24, 40), watched(40)
    H = damped(stats.covariance)
    tried = [tuple(as_float(rounded(part)) for part in low_rank_under(E, H, 6))]
    for _ in range(2):
        R = tried[-1][1]
        L = as_float(rounded(torch.linalg.lstsq(R, E).solution))
        gram = L @ H @ L.T
        tried.append((L, as_float(rounded(torch.linalg.solve(gram, L @ H @ E.T).T))))
    best = min(under(E - R @ L, H) for L, R in tried)
    L, R = (as_float(part) for part in lplr(E, stats, rank=6, store=rounded))
    assert under(E - R @ L, H) == pytest.approx(best, rel=1e-3)
    assert under(E - tried[0][1] @ tried[0][0], H) > best


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_best_round_is_the_one_that_is_kept(best: int, sign: int) -> None:
    """Whatever is stored in the other rounds is worse: each is spoiled by so much."""
    E, stats = sign * torch.randn(24, 40), watched(40)
    stored: list[Tensor] = []

    def spoiling(matrix: Tensor) -> Tensor:
        stored.append(matrix if len(stored) // 2 == best else 0.1 * matrix)
        return stored[-1]

    L, R = lplr(E, stats, rank=6, store=spoiling)
    assert len(stored) == 6
    assert L is stored[2 * best] and R is stored[2 * best + 1]
