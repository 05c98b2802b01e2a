"""Absmax scales against loops over tensors, channels and groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.quantized import quantize


def reference(W: Tensor, bits: int, granularity: str, group: int) -> list[list[float]]:
    """max|w| over the largest code for every block, rounded to bfloat16."""
    N, K = W.shape
    rows = [range(N)] if granularity == "tensor" else [[i] for i in range(N)]
    width = group if granularity == "group" else K
    columns = [range(start, min(start + width, K)) for start in range(0, K, width)]
    peaks = [[max(abs(W[i, j].item()) for i in r for j in c) for c in columns] for r in rows]
    return (
        (torch.tensor(peaks, dtype=torch.float64) / (2 ** (bits - 1) - 1))
        .to(torch.bfloat16)
        .tolist()
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(0, 999),
    st.integers(1, 5),
    st.integers(1, 13),
    st.sampled_from(["tensor", "channel", "group"]),
    st.integers(1, 16),
    st.sampled_from([2, 3, 4, 8]),
)
def test_is_the_largest_weight_of_each_block_over_the_largest_code(
    seed: int, N: int, K: int, granularity: str, group: int, bits: int
) -> None:
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    scale = absmax(W, bits=bits, granularity=granularity, group=group)
    assert scale.dtype == torch.bfloat16
    assert scale.tolist() == reference(W, bits, granularity, group)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_no_weight_is_off_by_more_than_half_a_step_and_the_rounding_of_the_scale(
    granularity: str, bits: int
) -> None:
    W = torch.randn(9, 50)
    scale = absmax(W, bits=bits, granularity=granularity, group=16)
    coded = quantize(W, scale, group=16, bits=bits)
    bound = (0.5 + (2 ** (bits - 1) - 1) * 2**-8) * scale.float().amax()
    assert (coded.dense() - W).abs().max() <= bound


def test_finer_blocks_cost_less_error() -> None:
    W = torch.randn(32, 256) * torch.rand(32, 256).exp()
    errors = []
    for granularity in ("tensor", "channel", "group"):
        scale = absmax(W, bits=4, granularity=granularity, group=16)
        errors.append((quantize(W, scale, group=16, bits=4).dense() - W).square().sum().item())
    # 1345, 621 and 236
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


def test_the_last_group_of_a_row_may_be_shorter() -> None:
    W = torch.tensor([[7.0, -14.0, 0.0, 3.5, 21.0]])
    scale = absmax(W, bits=4, granularity="group", group=2)
    assert scale.tolist() == [[2.0, 0.5, 3.0]]


def test_the_largest_code_follows_the_bits() -> None:
    W = torch.full((1, 4), 127.0)
    scales = [absmax(W, bits=b, granularity="tensor", group=4).item() for b in (2, 3, 8)]
    assert scales == [127.0, torch.tensor(127 / 3, dtype=torch.bfloat16).item(), 1.0]


def test_a_zero_block_has_scale_zero_and_zero_codes() -> None:
    W = torch.randn(3, 8)
    W[1] = 0
    scale = absmax(W, bits=4, granularity="channel", group=8)
    assert scale[1].item() == 0
    coded = quantize(W, scale, group=8, bits=4)
    assert not coded.codes[1].any()
    assert coded.dense().isfinite().all()
