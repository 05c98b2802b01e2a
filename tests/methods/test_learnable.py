"""Rounding that lets gradients by: the rounded value forward, the identity backward."""

import torch

from slimfx.methods.learnable import in_bfloat16, straight_through


def test_the_value_is_the_rounded_one_and_the_gradient_is_of_the_other() -> None:
    x = torch.tensor([0.4, 1.6, -2.2], requires_grad=True)
    found = straight_through(x, x.detach().round())
    assert found.tolist() == [0, 2, -2]
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]


def test_bfloat16_keeps_float32_and_the_gradient() -> None:
    x = torch.tensor([1 + 2**-9, 3.14159], requires_grad=True)
    found = in_bfloat16(x)
    assert found.dtype == torch.float32
    assert found.tolist() == [1.0, 3.140625]
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1]
