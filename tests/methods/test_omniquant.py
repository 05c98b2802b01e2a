"""Learned clipping: what descent sees is what is stored, and gradients are the straight-through
ones.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfx.methods.absmax import absmax
from slimfx.methods.masks import NofM, keep
from slimfx.methods.omniquant import learned_clipping
from slimfx.methods.quantized import largest_code, spread

GRAINS = ("tensor", "channel", "group")


def weight(N: int = 6, K: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    granularity=st.sampled_from(GRAINS),
    N=st.integers(1, 5),
    groups=st.integers(1, 4),
    gamma=st.floats(-4, 6),
)
def test_the_weight_that_descent_sees_is_the_one_that_is_stored(
    bits: int, granularity: str, N: int, groups: int, gamma: float
) -> None:
    W = weight(N, 4 * groups)
    mask = keep(W.abs(), NofM(2, 4))
    learned = learned_clipping(W, mask, bits=bits, granularity=granularity, group=6)
    values = {"gamma": torch.full_like(learned.values["gamma"], gamma)}
    parts, c = learned.finish(values)
    assert c is None and parts.L is None and parts.R is None
    torch.testing.assert_close(learned.weight(values), parts.dense())
    assert not parts.dense()[~mask].any()


def test_a_large_gamma_is_absmax_and_a_small_one_clips() -> None:
    W = weight()
    learned = learned_clipping(W, None, bits=4, granularity="channel", group=20)
    gamma = learned.values["gamma"]
    wide, _ = learned.finish({"gamma": gamma + 100})
    scale = absmax(W, bits=4, granularity="channel", group=20)
    assert torch.equal(wide.weight.scale, scale)
    narrow, _ = learned.finish({"gamma": gamma - 4})  # sigmoid(0) = 1/2
    assert torch.equal(narrow.weight.scale, (scale.float() / 2).to(torch.bfloat16))
    assert narrow.dense().abs().max() < wide.dense().abs().max()


@pytest.mark.parametrize("granularity", GRAINS)
def test_gradients_are_those_of_the_straight_through_formula(granularity: str) -> None:
    W, bits, group = weight(), 3, 6
    learned = learned_clipping(W, None, bits=bits, granularity=granularity, group=group)
    gamma = torch.zeros_like(learned.values["gamma"], requires_grad=True)
    pull = weight(seed=1)
    (learned.weight({"gamma": gamma}) * pull).sum().backward()

    scale = absmax(W, bits=bits, granularity=granularity, group=group).double() / 2
    step = spread(scale.to(torch.bfloat16).double(), group, 20)
    ratio, top = W.double() / step, largest_code(bits)
    inner = torch.where(ratio.abs() < top, ratio, 0.0)  # a clipped weight does not pull back
    by_step = pull.double() * (ratio.round().clamp(-top, top) - inner)
    share = torch.zeros(6, 20, dtype=torch.double) + spread(scale, group, 20) / 2  # d step/d gamma
    expected = by_step * share
    if granularity == "group":
        padded = torch.nn.functional.pad(expected, (0, 4)).unflatten(1, (4, 6)).sum(-1)
    else:
        padded = expected.sum(1, keepdim=True)
    expected = padded.sum().reshape(1, 1) if granularity == "tensor" else padded
    torch.testing.assert_close(gamma.grad.double(), expected, rtol=1e-2, atol=1e-3)


def test_a_zero_weight_stays_zero_and_finite() -> None:
    learned = learned_clipping(torch.zeros(3, 8), None, bits=4, granularity="group", group=4)
    gamma = learned.values["gamma"].requires_grad_()
    dense = learned.weight({"gamma": gamma})
    dense.sum().backward()
    assert not dense.any() and gamma.grad.isfinite().all()
