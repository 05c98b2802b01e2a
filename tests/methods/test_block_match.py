"""The adapters of the last pass: they start where they were and end as they are stored."""

import pytest
import torch

from slimfx.methods.absmax import absmax
from slimfx.methods.block_match import Stored, learned_adapter
from slimfx.methods.quantized import Parts, Quantized, as_float, quantize


def in_codes(x: torch.Tensor) -> Stored:
    scale = absmax(x, bits=4, granularity="group", group=8)
    return quantize(x, scale, group=8, bits=4)


def in_bfloat16(x: torch.Tensor) -> Stored:
    return x.to(torch.bfloat16)


def parts(store, *, floats: bool = False) -> Parts:  # type: ignore[no-untyped-def]
    draw = torch.Generator().manual_seed(0)
    W, L, R = (torch.randn(*s, generator=draw) for s in ((12, 16), (3, 16), (12, 3)))
    weight = W.to(torch.bfloat16) if floats else in_codes(W)
    return Parts(weight, store(L), store(R))


@pytest.mark.parametrize("store", [in_codes, in_bfloat16])
@pytest.mark.parametrize("floats", [False, True])
def test_descent_starts_at_the_solution(store, floats: bool) -> None:  # type: ignore[no-untyped-def]
    given = parts(store, floats=floats)
    learned = learned_adapter(given, store=store)
    torch.testing.assert_close(learned.weight(learned.values), given.dense(), rtol=0.02, atol=0.02)
    assert ("s" in learned.values) != floats


@pytest.mark.parametrize("store", [in_codes, in_bfloat16])
def test_what_descent_sees_is_stored_and_the_codes_stay(store) -> None:  # type: ignore[no-untyped-def]
    given = parts(store)
    learned = learned_adapter(given, store=store)
    draw = torch.Generator().manual_seed(1)
    values = {
        name: value + 0.1 * torch.randn(value.shape, generator=draw)
        for name, value in learned.values.items()
    }
    made, c = learned.finish(values)
    assert c is None
    assert isinstance(made.weight, Quantized) and isinstance(given.weight, Quantized)
    assert torch.equal(made.weight.codes, given.weight.codes)
    assert made.weight.scale.dtype == torch.bfloat16
    torch.testing.assert_close(learned.weight(values), made.dense())


def test_gradients_reach_every_value() -> None:
    given = parts(in_codes)
    learned = learned_adapter(given, store=in_codes)
    values = {name: value.clone().requires_grad_() for name, value in learned.values.items()}
    learned.weight(values).square().sum().backward()
    for name, value in values.items():
        assert value.grad is not None and value.grad.any(), name
    scaled = as_float(given.weight)
    expected = 2 * ((scaled + as_float(given.R) @ as_float(given.L)) * scaled)
    per_group = expected.unflatten(1, (2, 8)).sum(-1)
    torch.testing.assert_close(values["s"].grad, per_group, rtol=0.05, atol=0.5)


def test_a_weight_without_an_adapter_learns_its_scales() -> None:
    given = parts(in_codes)._replace(L=None, R=None)
    learned = learned_adapter(given, store=in_codes)
    assert set(learned.values) == {"s"}
    made, _ = learned.finish({"s": learned.values["s"] + 1.0})
    assert made.L is None and made.R is None
    ratio = made.weight.scale.float() / given.weight.scale.float()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.71828), rtol=0.01, atol=0)


def test_both_factors_are_learned_in_units_of_their_own() -> None:
    given = parts(in_bfloat16)
    small = given._replace(L=1e-6 * given.L, R=1e6 * given.R)
    learned = learned_adapter(small, store=in_bfloat16)
    for name in ("L", "R"):
        assert learned.values[name].square().mean().sqrt().item() == pytest.approx(1, rel=1e-2)
