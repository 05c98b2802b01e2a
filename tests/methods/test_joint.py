"""The joint method: better than its parts, in any pattern, with and without codes."""

from functools import partial

import pytest
import torch
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.covariance import damped
from slimfx.methods.descend import descend
from slimfx.methods.full_lora import low_rank_under
from slimfx.methods.joint import joint
from slimfx.methods.masks import NofM, Pattern, Unstructured, keep
from slimfx.methods.quantized import Parts, Quantized, as_float, quantize
from slimfx.methods.second_order import second_order
from slimfx.methods.slim_quant import slim_quant

HALF = NofM(2, 4)


def inputs(K: int, tokens: int = 2000) -> Tensor:
    return torch.randn(tokens, K) @ torch.randn(K, K) / K**0.5


def error(W: Tensor, dense: Tensor, H: Tensor) -> float:
    E = (W - dense).double()
    return float(((E @ H.double()) * E).sum())


def one_scale(target: Tensor, pattern: Pattern | None) -> Tensor:
    kept = target * keep(target.abs(), pattern)
    return slim_quant(kept, bits=4, granularity="tensor", group=1)


def rounded(matrix: Tensor) -> Quantized:
    return quantize(matrix, absmax(matrix, bits=4, granularity="group", group=32), group=32, bits=4)


def solved(
    W: Tensor,
    H: Tensor,
    *,
    rank: int,
    rounds: int = 4,
    pattern: Pattern | None = HALF,
    coded: bool = True,
    store: bool = False,
) -> Parts:
    def fit(E: Tensor, H: Tensor) -> tuple[Quantized | Tensor, Quantized | Tensor]:
        L, R = low_rank_under(E, H, rank)
        return (rounded(L), rounded(R)) if store else (L, R)

    return joint(
        W,
        H,
        rank=rank,
        rounds=rounds,
        scale_of=partial(one_scale, pattern=pattern) if coded else None,
        fit=fit,
        group=1,
        bits=4,
        pattern=pattern,
    )


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_joint_beats_its_parts_one_after_the_other(shape: tuple[int, int]) -> None:
    W = torch.randn(shape) * torch.rand(shape[0], 1)
    x = inputs(shape[1])
    H = damped(x.T @ x / len(x))
    second = second_order(W, H, one_scale(W, HALF), group=1, bits=4, pattern=HALF)
    L, R = low_rank_under(W - as_float(second), H, 6)
    in_turn = error(W, as_float(second) + R @ L, H)
    best = error(W, solved(W, H, rank=6).dense(), H)
    best_q = error(W, solved(W, H, rank=6, store=True).dense(), H)
    assert best < 0.8 * in_turn
    assert best <= best_q < 1.3 * best  # int4 adapters, their error taken up


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize(
    "pattern", [HALF, NofM(4, 8), Unstructured(0.5), Unstructured(0.5, "layer"), None]
)
def test_rank_0_is_second_order_and_descent(pattern: Pattern | None, coded: bool) -> None:
    W, x = torch.randn(24, 136), inputs(136, 500)
    H = damped(x.T @ x / 500)
    scale = one_scale(W, pattern) if coded else None
    second = second_order(W, H, scale, group=1, bits=4, pattern=pattern)
    found = solved(W, H, rank=0, pattern=pattern, coded=coded)
    assert found.L is None
    assert found.R is None
    assert isinstance(found.weight, Quantized) == coded
    assert error(W, found.dense(), H) <= error(W, as_float(second), H) * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("pattern", [HALF, Unstructured(0.5), Unstructured(0.5, "layer")])
def test_sparse_alone_with_an_adapter_keeps_the_pattern(pattern: Pattern) -> None:
    W, x = torch.randn(24, 136), inputs(136, 500)
    H = damped(x.T @ x / 500)
    found = solved(W, H, rank=5, pattern=pattern, coded=False)
    assert isinstance(found.weight, Tensor)
    assert int((found.weight != 0).sum()) == pattern.kept(24, 136)
    without = solved(W, H, rank=0, pattern=pattern, coded=False)
    assert error(W, found.dense(), H) < 0.9 * error(W, without.dense(), H)


def test_starts_from_the_best_adapter_of_the_weight_itself() -> None:
    low = torch.randn(48, 5) @ torch.randn(5, 64)
    W, x = low + 0.1 * torch.randn(48, 64), inputs(64, 1000)
    H = damped(x.T @ x / 1000)
    second = as_float(second_order(W, H, one_scale(W, HALF), group=1, bits=4, pattern=HALF))
    L, R = low_rank_under(W - second, H, 5)  # a start from nothing hides the low rank in Q
    found = solved(W, H, rank=5, rounds=1).dense()
    assert error(W, found, H) < 0.2 * error(W, second + R @ L, H)


def test_more_rounds_help() -> None:
    W, x = torch.randn(48, 64), inputs(64, 1000)
    H = damped(x.T @ x / 1000)
    errors = [error(W, solved(W, H, rank=6, rounds=rounds).dense(), H) for rounds in (2, 12)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("weight", ["zero", "constant", "one row"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_edges_are_finite(weight: str, tokens: int) -> None:
    W = {
        "zero": torch.zeros(8, 16),
        "constant": torch.full((8, 16), 0.3),
        "one row": torch.randn(1, 16),
    }[weight]
    x = torch.randn(1, 16)[:tokens]
    for coded in (True, False):
        parts = solved(W, damped(x.T @ x), rank=1, store=True, coded=coded)
        assert parts.dense().isfinite().all()


@pytest.mark.parametrize("rounds", [1, 4, 8])
@pytest.mark.parametrize("rank", [0, 5])
def test_it_is_the_alternation_and_its_best_iterate(rank: int, rounds: int) -> None:
    """Three quarters of the rounds solve Q afresh; two sweeps in the others, four in the end."""
    W, x = torch.randn(24, 64), inputs(64, 500)
    H = damped(x.T @ x / 500)
    tried: list[tuple[Tensor, Quantized]] = []

    def adapter(Q: Tensor) -> Tensor:
        L, R = low_rank_under(W - Q, H, rank)
        return R @ L if rank else torch.zeros_like(W)

    def afresh(T: Tensor) -> Quantized:
        return second_order(T, H, one_scale(T, HALF), group=1, bits=4, pattern=HALF)

    def refined(T: Tensor, Q: Quantized, sweeps: int) -> Quantized:
        return descend(T, H, Q, bits=4, pattern=HALF, sweeps=sweeps)

    def left(each: tuple[Tensor, Quantized]) -> float:
        return error(W, each[0] + as_float(each[1]), H)

    nothing = torch.zeros_like(W)
    for start in [nothing, adapter(nothing)] if rank else [nothing]:
        Q = afresh(W - start)
        tried.append((adapter(as_float(Q)), Q))
    RL, Q = min(tried, key=left)
    for done in range(1, rounds if rank else 1):
        Q = afresh(W - RL) if done < 0.75 * rounds else refined(W - RL, Q, 2)
        RL = adapter(as_float(Q))
        tried.append((RL, Q))
    tried.append((RL, refined(W - RL, Q, 4)))
    found = solved(W, H, rank=rank, rounds=rounds)
    assert error(W, found.dense(), H) == pytest.approx(min(map(left, tried)), rel=1e-6)


def test_rounds_that_go_wrong_are_not_kept() -> None:
    W, x = torch.randn(24, 64), inputs(64, 500)
    H = damped(x.T @ x / 500)
    fits = 0

    def fit(E: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal fits
        fits += 1
        L, R = low_rank_under(E, H, 5)
        return (L, R) if fits <= 4 else (0 * L, R)

    scale_of = partial(one_scale, pattern=HALF)
    how = {"group": 1, "bits": 4, "pattern": HALF}
    found = joint(W, H, rank=5, rounds=6, scale_of=scale_of, fit=fit, **how)
    assert fits == 8
    assert error(W, found.dense(), H) < 0.9 * error(W, solved(W, H, rank=0).dense(), H)
