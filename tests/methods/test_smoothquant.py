"""SmoothQuant against its equation, and what it is for: ranges that meet half way."""

import pytest
import torch
from torch import Tensor

from slimfx.methods.smoothquant import smoothquant
from slimfx.methods.stats import Stats, add_tokens, empty_stats


def stats_of(x: Tensor) -> Stats:
    return add_tokens(empty_stats(x.shape[1]), x)


def reference(W: Tensor, x: Tensor, alpha: float) -> list[float]:
    """1 / s_j of eq. 4, channel by channel in float64."""
    c = []
    for j in range(W.shape[1]):
        largest_x, largest_w = x[:, j].double().abs().max(), W[:, j].double().abs().max()
        c.append((largest_w ** (1 - alpha) / largest_x**alpha).item())
    return c


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_equals_the_equation_of_the_paper_rounded_to_bfloat16(alpha: float) -> None:
    W, x = torch.randn(7, 30), torch.randn(50, 30) * torch.logspace(-2, 2, 30)
    c = smoothquant(W, stats_of(x), alpha=alpha)
    assert c.tolist() == torch.tensor(reference(W, x, alpha)).to(torch.bfloat16).tolist()


def test_half_way_both_sides_of_a_channel_reach_as_far() -> None:
    W, x = torch.randn(7, 30), torch.randn(50, 30) * torch.logspace(-2, 2, 30)
    c = smoothquant(W, stats_of(x))
    inputs, weights = (x * c).abs().amax(0), (W / c).abs().amax(0)
    torch.testing.assert_close(inputs, weights, rtol=2**-7, atol=0)
    torch.testing.assert_close(
        inputs, (x.abs().amax(0) * W.abs().amax(0)).sqrt(), rtol=0.01, atol=0
    )


def test_alpha_one_moves_the_whole_range_of_the_inputs() -> None:
    W, x = torch.randn(7, 10), torch.randn(50, 10) * torch.logspace(-2, 2, 10)
    moved = (x * smoothquant(W, stats_of(x), alpha=1.0)).abs().amax(0)
    torch.testing.assert_close(moved, torch.ones(10), rtol=2**-7, atol=0)


def test_the_output_does_not_change() -> None:
    W, x = torch.randn(7, 30), torch.randn(50, 30) * torch.logspace(-1, 1, 30)
    c = smoothquant(W, stats_of(x))
    torch.testing.assert_close((x * c) @ (W / c).T, x @ W.T, rtol=1e-4, atol=1e-4)


def test_outliers_of_the_inputs_no_longer_spoil_their_rounding() -> None:
    W, x = torch.randn(16, 64) * 0.1, torch.randn(300, 64)
    x[:, 5] *= 60
    c = smoothquant(W, stats_of(x))

    def lost(x: Tensor, W: Tensor) -> float:
        step = x.abs().max() / 127  # one 8-bit scale for the whole input
        return (((x / step).round() * step - x) @ W.T).square().sum().item()

    assert lost(x * c, W / c) < 0.2 * lost(x, W)  # 0.05 seen


def test_dead_inputs_and_zero_columns_are_left_alone() -> None:
    W, x = torch.randn(4, 6), torch.randn(9, 6)
    x[:, 1], W[:, 2] = 0.0, 0.0
    for alpha in (0.0, 0.5, 1.0):
        c = smoothquant(W, stats_of(x), alpha=alpha)
        assert c[1].item() == c[2].item() == 1
        assert (c > 0).all()


def test_extreme_ranges_stay_positive_finite_and_exact_in_bfloat16() -> None:
    W, x = torch.randn(4, 30), torch.randn(9, 30) * torch.logspace(-30, 30, 30)
    c = smoothquant(W.to(torch.bfloat16), stats_of(x), alpha=1.0)
    assert torch.equal(c, c.to(torch.bfloat16).float())
    assert 0.9e-5 < c.min() <= c.max() < 1.1e5
