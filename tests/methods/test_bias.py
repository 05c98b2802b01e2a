"""Bias correction takes the mean off the error of the outputs, and nothing else."""

import torch

from slimfx.methods.bias import mean_error
from slimfx.methods.stats import add_tokens, empty_stats


def test_outputs_have_the_mean_of_the_dense_layer_again() -> None:
    W, b, x = torch.randn(6, 12), torch.randn(6), torch.randn(100, 12) + 2 * torch.randn(12)
    dense = W + 0.3 * torch.randn(6, 12)
    shift = mean_error(W, dense, add_tokens(empty_stats(12), x))
    want, got = x @ W.T + b, x @ dense.T + b + shift
    assert torch.allclose(got.mean(0), want.mean(0), atol=1e-4)
    assert (got - want).square().sum() < (got - shift - want).square().sum()


def test_inputs_without_a_mean_and_no_error_change_nothing() -> None:
    x = torch.randn(50, 8)
    centred = add_tokens(empty_stats(8), torch.cat([x, -x]))
    W = torch.randn(4, 8)
    assert mean_error(W, torch.randn(4, 8), centred).abs().max() < 1e-5
    assert not mean_error(W, W, add_tokens(empty_stats(8), x)).any()
    assert not mean_error(W, torch.randn(4, 8), empty_stats(8)).any()
