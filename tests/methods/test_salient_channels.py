"""SLiM-Quant^O: the count and choice of the salient channels, and what it gains."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.quantized import quantize
from slimfx.methods.salient_channels import salient_channels
from slimfx.methods.stats import Stats, add_tokens, empty_stats


def stats_of(x: Tensor) -> Stats:
    return add_tokens(empty_stats(x.shape[1]), x)


def reference(W: Tensor, x: Tensor, count: int) -> set[int]:
    """The `count` channels with the largest mean|x_j| ||W_j||, the lower index first."""
    size = (x.double().abs().mean(0) * W.double().square().sum(0).sqrt()).tolist()
    return set(sorted(range(len(size)), key=lambda j: (-size[j], j))[:count])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 300), st.floats(0.001, 1.0))
def test_halves_exactly_the_share_with_the_largest_product(
    seed: int, N: int, K: int, share: float
) -> None:
    torch.manual_seed(seed)
    W, x = torch.randn(N, K), torch.randn(7, K) * torch.rand(K)
    c = salient_channels(W, stats_of(x), share=share)
    count = max(1, round(share * K))
    assert set((c == 0.5).nonzero().flatten().tolist()) == reference(W, x, count)
    assert (c == 1).sum() == K - count


def test_both_the_inputs_and_the_weights_count() -> None:
    x, W = torch.ones(3, 300), torch.ones(2, 300)
    x[:, 7] *= 3
    W[:, 9] *= 4
    x[:, 11], W[:, 11] = 9.0, 0.1
    c = salient_channels(W, stats_of(x), share=2 / 300)
    assert (c != 1).nonzero().flatten().tolist() == [7, 9]


def test_equal_channels_are_taken_from_the_first_and_one_is_taken_at_least() -> None:
    c = salient_channels(torch.ones(2, 8), stats_of(torch.ones(3, 8)), share=0.25)
    assert c.tolist() == [0.5, 0.5, 1, 1, 1, 1, 1, 1]
    many = salient_channels(torch.ones(1, 5000), stats_of(torch.ones(3, 5000)), share=0.5)
    assert many.diff().count_nonzero() == 1
    assert (salient_channels(torch.ones(2, 8), stats_of(torch.ones(3, 8))) == 0.5).sum() == 1


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, 8.0])
def test_the_scale_is_the_inverse_of_the_factor_in_bfloat16(factor: float) -> None:
    c = salient_channels(torch.ones(2, 8), stats_of(torch.ones(3, 8)), factor=factor)
    assert c.dtype == torch.float32
    assert c[0].item() == torch.tensor(1 / factor).to(torch.bfloat16).item()
    assert (c[1:] == 1).all()


def test_the_error_of_the_outputs_falls_where_the_scale_does_not_clip() -> None:
    W, x = torch.randn(64, 256) * 0.02, torch.randn(500, 256)
    W[0, 0] = 0.2  # keeps the scale where it is: the input it meets is small
    x[:, [3, 90]] *= 20
    x[:, 0] *= 0.1
    errors = []
    for c in (torch.ones(256), salient_channels(W, stats_of(x))):
        scale = absmax(W / c, bits=4, granularity="tensor", group=128)
        E = W - quantize(W / c, scale, group=128, bits=4).dense() * c
        errors.append((x @ E.T).square().sum().item())
    assert errors[1] < 0.6 * errors[0]  # 0.42 seen


def test_dead_inputs_and_no_tokens_at_all_still_give_a_scale() -> None:
    W = torch.randn(3, 10)
    for x in (torch.zeros(4, 10), torch.zeros(0, 10)):
        assert salient_channels(W, stats_of(x)).tolist() == [0.5] + [1.0] * 9
