"""SparseGPT and OPTQ in one pass, against the column loop written out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods import PRUNERS
from slimfx.methods.absmax import absmax
from slimfx.methods.covariance import damped
from slimfx.methods.masks import NofM, Pattern, Unstructured, keep
from slimfx.methods.quantized import Quantized, as_float, quantize
from slimfx.methods.second_order import second_order
from slimfx.methods.stats import add_tokens, empty_stats


def correlated(tokens: int, K: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5


def covariance(tokens: int, K: int) -> Tensor:
    x = correlated(max(tokens, 1), K)[:tokens]
    return damped(x.T @ x / max(tokens, 1))


def error(W: Tensor, Q: Quantized | Tensor, H: Tensor) -> float:
    E = (W - as_float(Q)).double()
    return float(((E @ H.double()) * E).sum())


def sparse(W: Tensor, H: Tensor, pattern: Pattern | None) -> Tensor:
    found = second_order(W, H, None, group=1, bits=4, pattern=pattern)
    assert isinstance(found, Tensor)
    return found


def written_out(W: Tensor, H: Tensor, scale: float | None, n: int, m: int) -> Tensor:
    W, Hi = W.double().clone(), torch.linalg.inv(H.double())
    U = torch.linalg.cholesky(Hi, upper=True)
    mask = torch.ones_like(W)
    for j in range(W.shape[1]):
        if n < m and j % m == 0:
            score = W[:, j : j + m] ** 2 / U.diagonal()[j : j + m] ** 2
            mask[:, j : j + m] = torch.zeros_like(score).scatter(1, score.topk(n).indices, 1.0)
        q = W[:, j] if scale is None else (W[:, j] / scale).round().clamp(-7, 7) * scale
        q = q * mask[:, j]
        W[:, j + 1 :] -= ((W[:, j] - q) / U[j, j])[:, None] * U[j, j + 1 :]
        W[:, j] = q
    return W


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 1), (4, 8), (1, 3)])
@pytest.mark.parametrize("K", [24, 264])  # within one block of columns, and over several
def test_equals_the_column_loop(n: int, m: int, K: int, rounded: bool) -> None:
    W, H = torch.randn(12, K), covariance(600, K)
    scale = absmax(W, bits=4, granularity="tensor", group=1) if rounded else None
    pattern = NofM(n, m) if n < m else None
    Q = as_float(second_order(W, H, scale, group=1, bits=4, pattern=pattern))
    expected = written_out(W, H, None if scale is None else scale.float().item(), n, m)
    same = (Q.double() - expected).abs() < (1e-6 if rounded else 1e-3)
    assert same.float().mean() > 0.99  # a tie may fall the other way in float32
    assert error(W, Q, H) == pytest.approx(error(W, expected.float(), H), rel=0.01)


def test_beats_rounding_each_weight_by_itself() -> None:
    W, H = torch.randn(32, 64), covariance(800, 64)
    scale = absmax(W, bits=4, granularity="group", group=16)
    rounded = quantize(W, scale, group=16, bits=4)
    Q = second_order(W, H, scale, group=16, bits=4, pattern=None)
    assert error(W, Q, H) < 0.6 * error(W, rounded, H)  # 0.3 seen


def test_nothing_to_prune_and_nothing_to_round_gives_the_weight() -> None:
    W = torch.randn(5, 140)
    assert torch.equal(sparse(W, covariance(300, 140), None), W)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 160)])
def test_keeps_exactly_n_of_m_and_codes_in_range(n: int, m: int) -> None:
    scale = torch.tensor([[0.01]])  # small: every kept weight has a code, most at the limit
    W, H, pattern = torch.randn(9, 160), covariance(100, 160), NofM(n, m)
    coded = second_order(W, H, scale, group=1, bits=4, pattern=pattern)
    assert isinstance(coded, Quantized)
    assert int((coded.codes.unflatten(1, (-1, m)) != 0).sum(-1).max()) == n
    assert int(coded.codes.abs().max()) <= 7
    assert ((sparse(W, H, pattern).unflatten(1, (-1, m)) != 0).sum(-1) == n).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 9),
    K=st.integers(1, 300),
    sparsity=st.floats(0.01, 0.99),
    scope=st.sampled_from(["row", "layer"]),
)
def test_a_share_is_exact_to_one_weight(N: int, K: int, sparsity: float, scope: str) -> None:
    pattern = Unstructured(sparsity, scope)
    g = torch.Generator().manual_seed(N * K)
    kept = sparse(torch.randn(N, K, generator=g) + 3, torch.eye(K), pattern) != 0
    assert int(kept.sum()) == pattern.kept(N, K)
    if scope == "row":
        assert (kept.sum(1) == pattern.kept(1, K)).all()


@pytest.mark.parametrize(
    "pattern", [NofM(2, 4), NofM(4, 8), Unstructured(0.6, "row"), Unstructured(0.6, "layer")]
)
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(pattern: Pattern) -> None:
    x = correlated(2000, 192) * torch.rand(192).exp()
    stats = add_tokens(empty_stats(192, covariance=True), x)
    W, H = torch.randn(48, 192), damped(stats.covariance)
    wanda, magnitude = (
        error(W, W * keep(PRUNERS[name](W, stats), pattern), H) for name in ("wanda", "magnitude")
    )
    assert error(W, sparse(W, H, pattern), H) < 0.7 * wanda
    assert wanda < magnitude


def test_dead_channels_go_first() -> None:
    x = correlated(300, 32)
    x[:, ::4] = 0  # one of every four says nothing, and 2:4 can spare it
    kept = sparse(torch.randn(16, 32), damped(x.T @ x / 300), NofM(2, 4)) != 0
    assert kept[:, ::4].float().mean() < 0.1  # 0.5 of all


@pytest.mark.parametrize("pattern", [NofM(2, 4), Unstructured(0.5, "layer"), None])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_singular_covariance_gives_a_finite_result(tokens: int, pattern: Pattern | None) -> None:
    W, H = torch.randn(8, 32), covariance(tokens, 32)
    for scale in (absmax(W, bits=4, granularity="tensor", group=1), None):
        Q = second_order(W, H, scale, group=1, bits=4, pattern=pattern)
        assert as_float(Q).isfinite().all()


def test_an_indefinite_covariance_is_refused() -> None:
    H = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        second_order(torch.ones(2, 4), H, None, group=1, bits=4, pattern=NofM(2, 4))


def test_a_zero_weight_and_a_zero_scale_stay_zero() -> None:
    W, H = torch.zeros(3, 8), covariance(50, 8)
    for scale in (torch.zeros(1, 1), None):
        assert not as_float(second_order(W, H, scale, group=1, bits=4, pattern=NofM(2, 4))).any()


def test_the_weight_is_not_written_to() -> None:
    W = torch.randn(4, 8)
    before = W.clone()
    for scale in (torch.ones(1, 1), None):
        second_order(W, torch.eye(8), scale, group=1, bits=4, pattern=NofM(2, 4))
    assert torch.equal(W, before)


def test_a_zero_scale_gives_zero_codes_whatever_the_weight() -> None:
    W, H = 3 * torch.randn(3, 8), covariance(50, 8)
    scale = torch.tensor([[0.0], [0.5], [0.0]], dtype=torch.bfloat16)
    found = second_order(W, H, scale, group=1, bits=4, pattern=None)
    assert isinstance(found, Quantized)
    assert found.codes.any(1).tolist() == [False, True, False]
