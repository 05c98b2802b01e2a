"""The learned transform: its scale of the inputs and its codes undo each other."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfx.methods.absmax import absmax
from slimfx.methods.affinequant import learned_transform
from slimfx.methods.masks import Unstructured, keep
from slimfx.methods.omniquant import learned_clipping

HOW = {"bits": 4, "granularity": "group", "group": 6}


def weight(N: int = 6, K: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(spread=st.floats(0, 2), bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 99))
def test_the_weight_that_descent_sees_is_the_one_that_is_stored(
    spread: float, bits: int, seed: int
) -> None:
    W = weight(seed=seed)
    mask = keep(W.abs(), Unstructured(0.5))
    how = {**HOW, "bits": bits}
    learned = learned_transform(W, mask, torch.ones(20), **how)
    values = {**learned.values, "log_c": spread * weight(1, 20, seed + 1)[0]}
    parts, c = learned.finish(values)
    assert c is not None and c.dtype == torch.bfloat16 and (c > 0).all()
    torch.testing.assert_close(learned.weight(values), parts.dense() * c.float())
    assert not parts.dense()[~mask].any()


def test_without_a_transform_it_is_learned_clipping() -> None:
    W = weight()
    one = learned_transform(W, None, torch.ones(20), **HOW)
    other = learned_clipping(W, None, **HOW)
    assert torch.equal(one.weight(one.values), other.weight(other.values))


def test_it_starts_where_it_is_told() -> None:
    c = weight(1, 20)[0].exp().to(torch.bfloat16).float()
    learned = learned_transform(weight(), None, c, **HOW)
    _, kept = learned.finish(learned.values)
    torch.testing.assert_close(kept.float(), c, rtol=2**-7, atol=0)


def test_descent_finds_a_scale_that_spares_an_outlier_channel() -> None:
    W = weight(32, 24)
    W[:, 3] *= 50  # its group has no room for the others
    x = torch.ones(24)
    x[3] = 0.01
    learned = learned_transform(W, None, torch.ones(24), **HOW)
    values = {name: value.clone().requires_grad_() for name, value in learned.values.items()}
    adam = torch.optim.Adam(values.values(), lr=0.05)

    def loss() -> torch.Tensor:
        return ((learned.weight(values) - W) * x).square().mean()

    before = loss().item()
    for _ in range(100):
        adam.zero_grad()
        loss().backward()
        adam.step()
    assert loss().item() < 0.2 * before  # 0.03 when this was written


def test_the_codes_are_those_of_the_weight_over_the_scale() -> None:
    W, c = weight(), weight(1, 20, 1)[0].exp().to(torch.bfloat16).float()
    learned = learned_transform(W, None, c, bits=8, granularity="channel", group=20)
    values = {**learned.values, "gamma": torch.full((6, 1), 20.0)}  # nothing clipped
    scale = absmax(W / c, bits=8, granularity="channel", group=20)
    parts, _ = learned.finish(values)
    assert torch.equal(parts.weight.scale, scale)
    assert ((parts.dense() * c - W).abs() <= 0.51 * scale.float() * c).all()
