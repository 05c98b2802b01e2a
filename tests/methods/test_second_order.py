"""SparseGPT and OPTQ in one pass, against the column loop written out in float64."""

import pytest
import torch
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.covariance import damped
from slimfx.methods.quantized import quantize
from slimfx.methods.second_order import second_order


def correlated(tokens: int, K: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5


def error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    E = (W - Q).double()
    return float(((E @ H.double()) * E).sum())


def written_out(W: Tensor, H: Tensor, scale: float, n: int, m: int) -> Tensor:
    W, Hi = W.double().clone(), torch.linalg.inv(H.double())
    U = torch.linalg.cholesky(Hi, upper=True)
    keep = torch.ones_like(W)
    for j in range(W.shape[1]):
        if n < m and j % m == 0:
            score = W[:, j : j + m] ** 2 / U.diagonal()[j : j + m] ** 2
            keep[:, j : j + m] = torch.zeros_like(score).scatter(1, score.topk(n).indices, 1.0)
        q = (W[:, j] / scale).round().clamp(-7, 7) * scale * keep[:, j]
        W[:, j + 1 :] -= ((W[:, j] - q) / U[j, j])[:, None] * U[j, j + 1 :]
        W[:, j] = q
    return W


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 1), (4, 8), (1, 3)])
@pytest.mark.parametrize("K", [24, 264])  # within one block of columns, and over several
def test_equals_the_column_loop(n: int, m: int, K: int) -> None:
    W, H = torch.randn(12, K), damped(correlated(600, K).T @ correlated(600, K) / 600)
    scale = absmax(W, bits=4, granularity="tensor", group=1)
    Q = second_order(W, H, scale, group=1, bits=4, n=n, m=m).dense()
    expected = written_out(W, H, scale.float().item(), n, m)
    same = (Q.double() - expected).abs() < 1e-6
    assert same.float().mean() > 0.99  # a tie may fall the other way in float32
    assert error(W, Q, H) == pytest.approx(error(W, expected, H), rel=0.01)


def test_beats_rounding_each_weight_by_itself() -> None:
    x = correlated(800, 64)
    W, H = torch.randn(32, 64), damped(x.T @ x / 800)
    scale = absmax(W, bits=4, granularity="group", group=16)
    rounded = quantize(W, scale, group=16, bits=4).dense()
    Q = second_order(W, H, scale, group=16, bits=4, n=1, m=1).dense()
    assert error(W, Q, H) < 0.6 * error(W, rounded, H)  # 0.3 seen


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_keeps_exactly_n_of_m_and_codes_in_range(n: int, m: int) -> None:
    x = correlated(100, 160)
    scale = torch.tensor([[0.01]])  # small: every kept weight has a code, most at the limit
    coded = second_order(
        torch.randn(9, 160), damped(x.T @ x / 100), scale, group=1, bits=4, n=n, m=m
    )
    kept = (coded.codes.unflatten(1, (-1, m)) != 0).sum(-1)
    assert int(kept.max()) == n
    assert int(coded.codes.abs().max()) <= 7


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_singular_covariance_gives_a_finite_result(tokens: int) -> None:
    x = correlated(max(tokens, 1), 32)[:tokens]
    W = torch.randn(8, 32)
    scale = absmax(W, bits=4, granularity="tensor", group=1)
    H = damped(x.T @ x / max(tokens, 1))
    assert second_order(W, H, scale, group=1, bits=4, n=2, m=4).dense().isfinite().all()


def test_an_indefinite_covariance_is_refused() -> None:
    H = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        second_order(torch.ones(2, 4), H, torch.ones(1, 1), group=1, bits=4, n=2, m=4)


def test_the_weight_is_not_written_to() -> None:
    W = torch.randn(4, 8)
    before = W.clone()
    second_order(W, torch.eye(8), torch.ones(1, 1), group=1, bits=4, n=2, m=4)
    assert torch.equal(W, before)
