"""Gradients of the ops: those of a dense weight in float64, and no dense weight kept for them."""

import gc
import itertools
from typing import Any

import pytest
import slimfx.runtime.ops  # noqa: F401  makes the ops
import torch
from slimfx.runtime.pack import FLOAT_BITS, pack_24, pack_bitmask, pack_codes
from torch import Tensor

OPS = torch.ops.slimfx
N, K = 24, 20
SCALES = {"tensor": (1, 1), "channel": (N, 1), "group": (N, 3)}
GROUP = 8


def stored(op: str, form: str, bits: int) -> tuple[tuple[Any, ...], Tensor]:
    """The arguments of an op after x, and the weight in float64 that they stand for."""
    top = 2 ** (bits - 1)
    values = torch.randn(N, K).bfloat16()
    if bits < FLOAT_BITS:
        values = torch.randint(1 - top, top, (N, K), dtype=torch.int8)
    scale = None if bits == FLOAT_BITS else (torch.rand(SCALES[form]) + 0.5).bfloat16()
    if op == "linear_int":
        packed: tuple[Tensor, ...] = (pack_codes(values, bits),)
    elif op == "linear_24":
        drop = torch.rand(N, K // 4, 4).argsort(-1)[..., :2]
        values = values.view(N, K // 4, 4).scatter(-1, drop, 0).flatten(1)
        packed = pack_24(values, bits)
    else:
        mask = torch.rand(N, K) < 0.4
        values = values * mask
        packed = pack_bitmask(values, mask, bits)
    W = values.double()
    if scale is not None:
        wide = scale.double().expand(N, -1)
        W = W * (wide if wide.shape[1] == 1 else wide.repeat_interleave(GROUP, 1)[:, :K])
    return (*packed, scale, bits, GROUP), W


CASES = [
    *itertools.product(["linear_int", "linear_24", "linear_bitmask"], SCALES, (2, 3, 4, 8)),
    *itertools.product(["linear_24", "linear_bitmask"], ["tensor"], [FLOAT_BITS]),
]


@pytest.mark.parametrize(("op", "form", "bits"), CASES)
@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 3)])
def test_the_gradient_of_x_is_that_of_the_dense_weight(
    op: str, form: str, bits: int, leading: tuple[int, ...]
) -> None:
    arguments, W = stored(op, form, bits)
    x = torch.randn(*leading, K, dtype=torch.float64, requires_grad=True)
    sent = torch.randn(*leading, N, dtype=torch.float64)
    getattr(OPS, op)(x, *arguments).backward(sent)
    assert x.grad is not None and x.grad.shape == x.shape
    torch.testing.assert_close(x.grad, sent @ W, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("op", "bits"), [("linear_int", 4), ("linear_24", 4), ("linear_24", 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_has_the_dtype_of_x(op: str, bits: int, dtype: torch.dtype) -> None:
    arguments, W = stored(op, "group", bits)
    x = torch.randn(5, K).to(dtype).requires_grad_()
    sent = torch.randn(5, N).to(dtype)
    getattr(OPS, op)(x, *arguments).backward(sent)
    assert x.grad is not None and x.grad.dtype is dtype
    size = sent.double().abs() @ W.abs()
    eps = torch.finfo(dtype).eps
    assert ((x.grad.double() - sent.double() @ W).abs() <= 2 * eps * size + 1e-12).all()


def test_gradcheck_and_the_gradient_of_the_gradient() -> None:
    arguments, _ = stored("linear_24", "group", 4)
    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: OPS.linear_24(x, *arguments), x)
    torch.autograd.gradgradcheck(lambda x: OPS.linear_24(x, *arguments).square(), x)


@pytest.mark.parametrize("op", ["linear_int", "linear_24", "linear_bitmask"])
def test_torch_finds_the_gradients_sound(op: str) -> None:
    arguments, _ = stored(op, "group", 4)
    x = torch.randn(3, K, requires_grad=True)
    torch.library.opcheck(getattr(OPS, op).default, (x, *arguments))


def test_what_is_stored_gets_no_gradient() -> None:
    (values, indices, _, bits, group), _ = stored("linear_24", "tensor", FLOAT_BITS)
    values.requires_grad_()
    x = torch.randn(3, K, requires_grad=True)
    OPS.linear_24(x, values, indices, None, bits, group).sum().backward()
    assert values.grad is None and x.grad is not None
    y = OPS.linear_24(x.detach(), values, indices, None, bits, group)
    assert not y.requires_grad or torch.autograd.grad(y.sum(), values, allow_unused=True) == (None,)


def test_between_the_passes_nothing_as_large_as_the_weight_is_held() -> None:
    arguments, _ = stored("linear_24", "group", 4)
    x = torch.randn(3, K, requires_grad=True)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = OPS.linear_24(x, *arguments)
    given = {t.data_ptr() for t in arguments if isinstance(t, Tensor)}
    assert {t.data_ptr() for t in held} == given
    del y
    gc.collect()
    assert all(t.numel() < N * K for t in held)


@pytest.mark.parametrize("peak", [1.0, 1000.0])
def test_gradients_pass_fp8_as_if_nothing_happened(peak: float) -> None:
    x = (torch.randn(4, 6) * peak).requires_grad_()
    sent = torch.randn(4, 6)
    OPS.quantize_fp8(x).backward(sent)
    assert torch.equal(x.grad, sent)  # type: ignore[arg-type]
    torch.library.opcheck(OPS.quantize_fp8.default, (x,))
