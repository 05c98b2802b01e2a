"""JSQ against the range of the outputs without each weight, token by token."""

import pytest
import torch
from torch import Tensor

from slimfx.methods.jsq import jsq
from slimfx.methods.masks import NofM, Unstructured, keep
from slimfx.methods.stats import Stats, add_tokens, empty_stats
from slimfx.methods.wanda import wanda


def stats_of(x: Tensor) -> Stats:
    """Statistics of the tokens x [tokens, K], with the covariance."""
    return add_tokens(empty_stats(x.shape[1], covariance=True), x)


def ranges(W: Tensor, x: Tensor) -> Tensor:
    """A_ij: the range of output i with weight j taken out, in float64."""
    A = torch.empty(W.shape, dtype=torch.float64)
    for j in range(W.shape[1]):
        without = W.double().clone()
        without[:, j] = 0
        Y = x.double() @ without.T
        A[:, j] = Y.amax(0) - Y.amin(0)
    return A


def correlated(tokens: int, K: int) -> Tensor:
    """Inputs that lie near each other, of unequal size and with a mean."""
    return torch.randn(tokens, K) @ torch.randn(K, K) / K**0.5 * torch.rand(K).exp() + torch.randn(
        K
    )


def test_without_the_second_term_it_is_wanda() -> None:
    W, stats = torch.randn(6, 16), stats_of(correlated(50, 16))
    torch.testing.assert_close(jsq(W, stats, rho=0.0), wanda(W, stats), rtol=1e-6, atol=0)


def test_the_second_term_is_the_range_without_the_weight() -> None:
    W, x = torch.distributions.StudentT(4.0).sample((20, 48)), correlated(4000, 48)
    stats = stats_of(x)
    per_token = (jsq(W, stats, rho=1.0) - wanda(W, stats)).double().flatten()
    # from the largest of the authors' tokens (4.58) to that of 4000 (3.5), sums over them to means
    found = per_token * (128 * 2048) ** 0.5 * 3.5 / 4.58
    expected = ranges(W, x).flatten()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9  # 0.98
    assert 0.75 < (found / expected).min() <= (found / expected).max() < 1.3  # extremes vary
    assert (found / expected).mean().item() == pytest.approx(1, abs=0.05)


def test_the_number_of_tokens_does_not_change_the_balance_of_the_terms() -> None:
    W, x = torch.randn(5, 12), correlated(40, 12)
    once, often = stats_of(x), stats_of(x.repeat(50, 1))
    torch.testing.assert_close(jsq(W, once), jsq(W, often), rtol=1e-4, atol=1e-6)


def test_the_variance_is_that_of_the_outputs_without_the_weight() -> None:
    W, x = torch.randn(5, 12), correlated(300, 12)
    two = jsq(W, stats_of(x), rho=2.0).double() - jsq(W, stats_of(x), rho=1.0).double()
    deviations = torch.empty(5, 12, dtype=torch.float64)
    for j in range(12):
        without = W.double().clone()
        without[:, j] = 0
        deviations[:, j] = (x.double() @ without.T).std(0, correction=0)
    ratio = two / deviations
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0].item()), rtol=1e-3, atol=0)
    assert ratio[0, 0].item() == pytest.approx(2 * 4.575 / 512, rel=1e-3)


def test_keeps_other_weights_than_wanda_and_a_narrower_range() -> None:
    W, x = torch.distributions.StudentT(3.0).sample((100, 48)), correlated(500, 48)
    stats = stats_of(x)
    masks = [keep(score, Unstructured(0.5)) for score in (jsq(W, stats), wanda(W, stats))]
    assert 0 < (masks[0] != masks[1]).float().mean() < 0.1
    widths = [((Y := x @ (W * m).T).amax(0) - Y.amin(0)).mean().item() for m in masks]
    assert widths[0] < widths[1]


def test_a_dead_input_has_the_range_of_the_whole_output() -> None:
    W, x = torch.randn(6, 16), torch.randn(200, 16)
    x[:, 9] = 0
    S = jsq(W, stats_of(x), rho=1.0)[:, 9].double()
    Y = x.double() @ W.double().T
    torch.testing.assert_close(S * 512 / 9.15, Y.std(0, correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("case", ["one token", "no token", "zero weight", "singular"])
def test_edges_are_finite(case: str) -> None:
    W = torch.zeros(3, 8) if case == "zero weight" else torch.randn(3, 8)
    x = {"one token": torch.randn(1, 8), "no token": torch.randn(0, 8)}.get(case)
    x = torch.randn(20, 1) * torch.randn(8) if x is None else x
    S = jsq(W, stats_of(x))
    assert S.isfinite().all()
    assert keep(S, NofM(2, 4)).sum() == 12
    if case == "one token":  # whose range is zero, but for rounding
        torch.testing.assert_close(S, wanda(W, stats_of(x)), rtol=1e-3, atol=1e-3)


def test_leaves_its_arguments_as_they_were_and_needs_the_covariance() -> None:
    W = torch.randn(3, 8, dtype=torch.bfloat16)
    before = W.clone()
    assert jsq(W, stats_of(torch.randn(9, 8))).dtype == torch.float32
    assert torch.equal(W, before)
    with pytest.raises(AssertionError, match="without the covariance"):
        jsq(W, add_tokens(empty_stats(8), torch.randn(9, 8)))


def test_the_weight_of_the_range_is_the_authors() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # covariance one
    W, T = torch.ones(1, 2), 128 * 2048
    z = torch.special.ndtri(torch.tensor((T - 0.375) / (T + 0.25), dtype=torch.float64)).item()
    found = (jsq(W, stats_of(x)) - 1).flatten().tolist()
    assert found == pytest.approx([2.1 * 2 * z / T**0.5] * 2, rel=5e-5)
