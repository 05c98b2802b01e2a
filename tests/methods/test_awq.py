"""AWQ against its grid search on the tokens themselves."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.awq import awq
from slimfx.methods.quantized import quantize
from slimfx.methods.stats import Stats, add_tokens, empty_stats


def rounded(W: Tensor, bits: int = 3, group: int = 16) -> Tensor:
    """Absmax in groups of 16, as a dense matrix."""
    scale = absmax(W, bits=bits, granularity="group", group=group)
    return quantize(W, scale, group=group, bits=bits).dense()


def stats_of(x: Tensor) -> Stats:
    return add_tokens(empty_stats(x.shape[1], covariance=True), x)


def uneven(tokens: int, K: int) -> Tensor:
    """A few channels much larger than the others, as in language models."""
    sizes = torch.ones(K)
    sizes[:: K // 4] = 30.0
    return torch.randn(tokens, K) * sizes


def output_error(W: Tensor, x: Tensor, c: Tensor) -> float:
    """||(x c) (Q(W / c))^T - x W^T||^2 in float64."""
    y = (x * c).double() @ rounded(W / c).double().T
    return (y - x.double() @ W.double().T).square().sum().item()


def reference(W: Tensor, x: Tensor, steps: int) -> float:
    """The least output error of all alphas (eq. 4 and 5)."""
    errors = []
    for step in range(steps + 1):
        s = x.double().abs().mean(0) ** (step / steps)
        s = s / (s.max() * s.min()).sqrt()
        errors.append(output_error(W, x, (1 / s).to(torch.bfloat16).float()))
    return min(errors)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_finds_the_best_alpha_of_the_grid(steps: int) -> None:
    W, x = torch.randn(24, 64), uneven(200, 64)
    found = output_error(W, x, awq(W, stats_of(x), quantize=rounded, steps=steps))
    assert found == pytest.approx(reference(W, x, steps), rel=1e-4)


def test_salient_channels_gain_a_lot_over_no_scale() -> None:
    W, x = torch.randn(24, 64), uneven(200, 64)
    c = awq(W, stats_of(x), quantize=rounded)
    assert output_error(W, x, c) < 0.6 * output_error(W, x, torch.ones(64))  # 0.3 seen
    assert c[0] < c[1]  # a large input is divided, its weights multiplied


def test_the_largest_and_the_smallest_scale_are_inverse_to_each_other() -> None:
    W, x = torch.randn(24, 64), uneven(200, 64)
    c = awq(W, stats_of(x), quantize=rounded)
    assert c.max().item() > 1.5
    assert (c.max() * c.min()).item() == pytest.approx(1, rel=2**-7)


def test_alpha_zero_is_no_scale_and_wins_where_none_is_better() -> None:
    W, x = torch.randn(4, 16), torch.ones(5, 16)
    assert torch.equal(awq(W, stats_of(x), quantize=rounded), torch.ones(16))
    # nothing is lost at any alpha: the first one stays
    uneven_x = torch.randn(9, 16) * torch.logspace(-1, 1, 16)
    assert torch.equal(awq(W, stats_of(uneven_x), quantize=lambda w: w * 0), torch.ones(16))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(2, 20), st.sampled_from([2, 3, 4, 8]))
def test_is_positive_exact_in_bfloat16_and_no_worse_than_no_scale(
    seed: int, N: int, K: int, bits: int
) -> None:
    torch.manual_seed(seed)
    W, x = torch.randn(N, K), torch.randn(12, K) * torch.randn(K).mul(3).exp()
    x[:, torch.rand(K) < 0.2] = 0
    stats = stats_of(x)
    c = awq(W, stats, quantize=partial(rounded, bits=bits), steps=4)
    assert c.dtype == torch.float32
    assert torch.equal(c, c.to(torch.bfloat16).float())
    assert (c > 0).all()
    assert c.isfinite().all()
    assert (c[stats.dead] == 1).all()

    def error(c: Tensor) -> float:
        E = (W - rounded(W / c, bits) * c).double()
        return ((E @ stats.covariance.double()) * E).sum().item()

    assert error(c) <= error(torch.ones(K)) * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("case", ["dead", "one token", "zero weight", "extreme"])
def test_edges(case: str) -> None:
    W = torch.zeros(3, 8) if case == "zero weight" else torch.randn(3, 8)
    x = {"dead": torch.zeros(4, 8), "one token": torch.randn(1, 8)}.get(case, torch.randn(9, 8))
    if case == "extreme":
        x = x * torch.logspace(-18, 18, 8)
    c = awq(W, stats_of(x), quantize=rounded)
    assert c.isfinite().all()
    assert 1e-3 < c.min() <= c.max() < 1e3  # four decades at most
    if case == "dead":
        assert torch.equal(c, torch.ones(8))


def test_leaves_the_weight_as_it_was() -> None:
    W, x = torch.randn(4, 16), uneven(20, 16)
    before = W.clone()
    awq(W, stats_of(x), quantize=rounded)
    assert torch.equal(W, before)


def test_the_grid_of_the_paper_has_twenty_steps() -> None:
    W, x = torch.randn(24, 64), uneven(200, 64)
    found = [awq(W, stats_of(x), quantize=rounded, steps=steps) for steps in (20, 21)]
    assert torch.equal(awq(W, stats_of(x), quantize=rounded), found[0])
    assert not torch.equal(*found)


def test_one_dead_channel_does_not_keep_the_others_from_a_scale() -> None:
    W, x = torch.randn(24, 64), uneven(200, 64)
    x[:, 1] = 0
    assert awq(W, stats_of(x), quantize=rounded).unique().numel() > 2


def test_the_least_scale_is_a_ten_thousandth_of_the_largest() -> None:
    def loses_all_but_at_alpha_one(W: Tensor) -> Tensor:
        return W if (W[0, 0] / W[0, 1]).item() > 1000 else 0 * W

    c = awq(
        torch.ones(1, 2),
        stats_of(torch.tensor([[1.0, 1e-9]])),
        quantize=loses_all_but_at_alpha_one,
        steps=1,
    )
    assert (c[1] / c[0]).item() == pytest.approx(1e4, rel=2**-7)


def test_every_step_of_the_grid_is_tried_once_and_none_behind_one() -> None:
    tried: list[Tensor] = []

    def watching(W: Tensor) -> Tensor:
        tried.append(W)
        return rounded(W)

    W, x = torch.randn(4, 16), uneven(20, 16)
    awq(W, stats_of(x), quantize=watching, steps=3)
    assert len(tried) == 4
    assert torch.equal(tried[0], W)
