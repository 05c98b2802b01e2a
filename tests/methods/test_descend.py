"""Descent on codes: never worse, exact on one group, the mask moves for 2:4 and stays otherwise."""

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.covariance import damped
from slimfx.methods.descend import descend
from slimfx.methods.masks import keep_largest
from slimfx.methods.quantized import Quantized, quantize


def error(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    E = (W - Q).double()
    return ((E @ H.double()) * E).sum(1)


def problem(N: int, K: int, n: int, m: int, group: int = 1) -> tuple[Tensor, Tensor, Quantized]:
    x = torch.randn(400, K) @ torch.randn(K, K) / K**0.5
    W = torch.randn(N, K)
    scale = absmax(W, bits=4, granularity="tensor" if group == 1 else "group", group=group)
    coded = quantize(W, scale, group=group, bits=4)
    mask = keep_largest(W.abs(), n=n, m=m)
    return W, damped(x.T @ x / 400), Quantized(coded.codes * mask, coded.scale, group)


@pytest.mark.parametrize(("n", "m", "group"), [(2, 4, 1), (2, 4, 16), (1, 1, 1), (4, 8, 16)])
def test_each_sweep_lowers_the_error_of_every_row(n: int, m: int, group: int) -> None:
    W, H, coded = problem(16, 144, n, m, group)
    before = error(W, coded.dense(), H)
    for _ in range(3):
        coded = descend(W, H, coded, bits=4, n=n, m=m, sweeps=1)
        after = error(W, coded.dense(), H)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert int((coded.codes.unflatten(1, (-1, m)) != 0).sum(-1).max()) <= n


def test_halves_the_error_of_a_rounded_two_in_four_weight() -> None:
    W, H, coded = problem(32, 64, 2, 4)
    better = descend(W, H, coded, bits=4, n=2, m=4, sweeps=3)
    assert error(W, better.dense(), H).sum() < 0.5 * error(W, coded.dense(), H).sum()  # 0.2 seen


def test_one_group_is_close_to_the_best_of_all_codes() -> None:
    W, H, coded = problem(20, 4, 2, 4)
    step = coded.scale.float().item()
    options = []
    for a, b in combinations(range(4), 2):
        for codes in product(range(-7, 8), repeat=2):
            row = torch.zeros(4)
            row[a], row[b] = codes
            options.append(row * step)
    best = torch.stack([error(W, row.expand_as(W), H) for row in options]).amin(0)
    found = error(W, descend(W, H, coded, bits=4, n=2, m=4, sweeps=4).dense(), H)
    assert (found >= best * (1 - 1e-5)).all()
    assert found.sum() < 1.1 * best.sum()  # 1.01 seen: pairs are rounded in turn, not together


def test_other_patterns_keep_their_zeros() -> None:
    W, H, coded = problem(8, 32, 4, 8)
    better = descend(W, H, coded, bits=4, n=4, m=8, sweeps=2)
    assert (better.codes[coded.codes == 0] == 0).all()


def test_a_zero_scale_gives_zero_codes() -> None:
    coded = Quantized(torch.zeros(3, 8, dtype=torch.int8), torch.zeros(1, 1), 1)
    assert not descend(
        torch.zeros(3, 8), torch.eye(8), coded, bits=4, n=2, m=4, sweeps=1
    ).codes.any()
