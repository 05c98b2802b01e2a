"""Alternation against the algorithms of the papers it stands for, ten lines each in float64."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.alternate import alternate
from slimfx.methods.covariance import damped
from slimfx.methods.lplr import lplr_under
from slimfx.methods.masks import NofM, Unstructured, keep
from slimfx.methods.naive_lora import naive_lora
from slimfx.methods.qera_diagonal import qera_diagonal
from slimfx.methods.quantized import Quantized, quantize
from slimfx.methods.second_order import second_order
from slimfx.methods.stats import Stats, add_tokens, empty_stats
from slimfx.methods.wanda import wanda

N, K, RANK = 24, 32, 3
Pair = tuple[Tensor, Tensor]
"""The compressed weight and the low-rank part, dense."""


def stats_of(x: Tensor) -> Stats:
    return add_tokens(empty_stats(x.shape[1], covariance=True), x)


def coded(W: Tensor, bits: int = 2) -> Quantized:
    """One fixed scale, so that float32 and float64 round alike."""
    return quantize(W, torch.full((1, 1), 0.75), group=K, bits=bits)


def rounded(W: Tensor) -> Tensor:
    """The same in float64."""
    return 0.75 * (W / 0.75).round().clamp(-1, 1)


def svd(E: Tensor, rank: int = RANK) -> Tensor:
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def loftq(W: Tensor, rounds: int) -> Iterator[Pair]:
    """Li et al. 2023, algorithm 1; returns the last."""
    AB = torch.zeros_like(W)
    for _ in range(rounds):
        Q = rounded(W - AB)
        AB = svd(W - Q)
        yield Q, AB


def lq_lora(W: Tensor, rounds: int) -> Iterator[Pair]:
    """Guo et al. 2023, algorithm 1; ends where the error first rises."""
    Q, last = torch.zeros_like(W), float("inf")
    for _ in range(rounds):
        L = svd(W - Q)
        Q = rounded(W - L)
        if (W - Q - L).norm() > last:
            return
        last = (W - Q - L).norm()
        yield Q, L


def oats(W: Tensor, x: Tensor, rounds: int, share: float) -> Iterator[Pair]:
    """Zhang and Papyan 2024: alternating thresholding of W D, D = diag(rms); returns the last."""
    D = x.square().mean(0).sqrt()
    S = torch.zeros_like(W)
    for _ in range(rounds):
        L = svd(W * D - S)
        S = W * D - L
        least = S.abs().sort(1).values[:, round(share * K), None]
        S = S * (S.abs() >= least)
        yield S / D, L / D


def losparse(W: Tensor) -> Pair:
    """Li et al. 2023 (LoSparse): the low rank of W, and what is left pruned by magnitude."""
    UV = svd(W)
    S = W - UV
    half = S.abs().unflatten(1, (-1, 4)).sort(-1).values[..., 2:3]
    return (S.unflatten(1, (-1, 4)) * (S.abs().unflatten(1, (-1, 4)) >= half)).flatten(1), UV


def frobenius(E: Tensor) -> float:
    return E.double().norm().item()


def compensate(E: Tensor) -> tuple[Tensor, Tensor]:
    return naive_lora(E, empty_stats(K), rank=RANK)


def left(W: Tensor, pairs: list[Pair], norm: Callable[[Tensor], float] = frobenius) -> list[float]:
    return [norm(W - a - b) for a, b in pairs]


def watched(error: Callable[[Tensor], float], seen: list[float]) -> Callable[[Tensor], float]:
    def remember(E: Tensor) -> float:
        seen.append(error(E))
        return seen[-1]

    return remember


@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_loftq_is_quantized_first_with_the_svd(rounds: int) -> None:
    W, seen = torch.randn(N, K), []  # type: ignore[var-annotated]
    parts = alternate(
        W,
        compress=coded,
        compensate=compensate,
        error=watched(frobenius, seen),
        rounds=rounds,
        low_rank_first=False,
    )
    expected = left(W, list(loftq(W.double(), rounds)))
    assert seen[0::2] == pytest.approx(expected, rel=1e-4)  # after each round of the paper
    assert frobenius(W - parts.dense()) == pytest.approx(min(seen), rel=1e-5)
    assert min(seen) <= expected[-1] * (1 + 1e-6)  # what the paper returns


def test_lq_lora_begins_with_the_low_rank_of_the_weight() -> None:
    W, seen = torch.randn(N, K), []  # type: ignore[var-annotated]
    parts = alternate(
        W,
        compress=coded,
        compensate=compensate,
        error=watched(frobenius, seen),
        rounds=8,
        low_rank_first=True,
    )
    expected = left(W, list(lq_lora(W.double(), 8)))
    assert seen[0::2][: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert frobenius(W - parts.dense()) == pytest.approx(min(seen), rel=1e-5)
    assert min(seen) <= expected[-1] * (1 + 1e-6)


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_oats_is_wanda_and_qera_approx_low_rank_first(share: float) -> None:
    W, x, seen = torch.randn(N, K), torch.randn(99, K) * torch.rand(K).exp(), []  # type: ignore[var-annotated]
    stats = stats_of(x)

    def weighed(E: Tensor) -> float:
        return (E.double() * stats.rms.double()).norm().item()

    parts = alternate(
        W,
        compress=lambda T: T * keep(wanda(T, stats), Unstructured(share)),
        compensate=partial(qera_diagonal, stats=stats, rank=RANK),
        error=watched(weighed, seen),
        rounds=6,
        low_rank_first=True,
    )
    pairs = list(oats(W.double(), x.double(), 6, share))
    expected = left(W, pairs, weighed)
    assert seen[0::2] == pytest.approx(expected, rel=1e-3)
    assert weighed(W - parts.dense()) <= expected[-1] * (1 + 1e-3)
    assert (parts.weight == 0).sum() == N * round(share * K)  # type: ignore[union-attr]


def test_losparse_is_one_round_low_rank_first() -> None:
    W = torch.randn(N, K)
    parts = alternate(
        W,
        compress=lambda T: T * keep(T.abs(), NofM(2, 4)),
        compensate=compensate,
        error=frobenius,
        rounds=1,
        low_rank_first=True,
    )
    S, UV = losparse(W.double())
    torch.testing.assert_close(parts.weight.double(), S, rtol=0, atol=1e-4)  # type: ignore[union-attr]
    assert parts.L is not None and parts.R is not None
    torch.testing.assert_close((parts.R @ parts.L).double(), UV, rtol=0, atol=1e-4)  # type: ignore[operator]


def optq(W: Tensor, H: Tensor, step: float, top: int) -> Tensor:
    """LDLQ for one scale: round a column, pass its error on (Frantar et al. 2022, algorithm 1)."""
    W, Q = W.clone(), torch.zeros_like(W)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for j in range(W.shape[1]):
        Q[:, j] = step * (W[:, j] / step).round().clamp(-top, top)
        W[:, j:] -= torch.outer((W[:, j] - Q[:, j]) / U[j, j], U[j, j:])
    return Q


def test_caldera_is_second_order_first_with_adapters_rounded_in_the_loop() -> None:
    W, x, seen = torch.randn(N, K), torch.randn(99, K) @ torch.randn(K, K) / K**0.5, []  # type: ignore[var-annotated]
    H = damped(stats_of(x).covariance)
    scale = torch.full((1, 1), 0.75)
    second = partial(second_order, H=H, scale=scale, group=K, bits=2, pattern=None)

    def stored(M: Tensor) -> Quantized:
        return quantize(M, absmax(M, bits=4, granularity="group", group=8), group=8, bits=4)

    def under(E: Tensor) -> float:
        return ((E.double() @ H.double()) * E.double()).sum().item()

    parts = alternate(
        W,
        compress=second,
        compensate=lambda E: lplr_under(E, H, RANK, stored),
        error=watched(under, seen),
        rounds=4,
        low_rank_first=False,
    )
    LR, expected = torch.zeros(N, K, dtype=torch.float64), []  # algorithm 1, line by line
    for _ in range(4):
        Q = optq(W.double() - LR, H.double(), 0.75, 1)
        L, R = lplr_under((W.double() - Q).float(), H, RANK, stored)
        LR = (R.dense() @ L.dense()).double()  # type: ignore[union-attr]
        expected.append(under(W - Q - LR))
    assert seen[0::2] == pytest.approx(expected, rel=1e-2)
    assert under(W - parts.dense()) == pytest.approx(min(seen), rel=1e-4)
    assert isinstance(parts.L, Quantized)  # as stored, and the next weight takes up its rounding


@pytest.mark.parametrize("low_rank_first", [False, True])
def test_the_least_error_is_kept_even_if_the_last_steps_are_bad(low_rank_first: bool) -> None:
    W, errors = torch.randn(N, K), iter([5.0, 3.0, 3.0, 9.0, 8.0, 7.0, 6.0])
    weights: list[Tensor] = []

    def compress(T: Tensor) -> Tensor:
        weights.append(T.round())
        return weights[-1]

    parts = alternate(
        W,
        compress=compress,
        compensate=compensate,
        error=lambda E: next(errors),
        rounds=4,
        low_rank_first=low_rank_first,
    )
    # steps with both parts: 1 (5.0), 2 (3.0, the first of the least), ...; the second compression
    # is step 2 where the weight comes first, step 3 otherwise
    assert parts.weight is weights[0 if low_rank_first else 1]


def test_more_rounds_never_lose() -> None:
    W = torch.randn(N, K)
    run = partial(alternate, W, compress=coded, compensate=compensate, error=frobenius)
    for first in (False, True):
        lost = [frobenius(W - run(rounds=r, low_rank_first=first).dense()) for r in (1, 2, 4, 8)]
        assert lost == sorted(lost, reverse=True)
        assert lost[-1] < lost[0]


@pytest.mark.parametrize("weight", ["zero", "one row", "one column"])
def test_edges(weight: str) -> None:
    W = {
        "zero": torch.zeros(4, 8),
        "one row": torch.randn(1, 8),
        "one column": torch.randn(8, 1),
    }[weight]
    parts = alternate(
        W,
        compress=coded,
        compensate=lambda E: naive_lora(E, empty_stats(W.shape[1]), rank=1),
        error=frobenius,
        rounds=3,
        low_rank_first=True,
    )
    assert frobenius(W - parts.dense()) <= 1e-5 * frobenius(W)


def test_leaves_the_weight_as_it_was() -> None:
    W = torch.randn(N, K)
    before = W.clone()
    alternate(
        W, compress=coded, compensate=compensate, error=frobenius, rounds=2, low_rank_first=False
    )
    assert torch.equal(W, before)
