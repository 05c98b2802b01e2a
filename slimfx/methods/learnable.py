"""What gradient descent may change in one compressed weight, and how rounding lets gradients by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slimfx.methods.quantized import Parts

Values = Mapping[str, Tensor]


class Learnable(NamedTuple):
    """One weight as a function of what is learned about it."""

    values: dict[str, Tensor]
    """Float32, where descent starts."""
    weight: Callable[[Values], Tensor]
    """The dense float32 weight [N, K] that the layer's own input meets, rounded as it will be
    stored, with gradients."""
    finish: Callable[[Values], tuple[Parts, Tensor | None]]
    """What is stored, and the scale of the inputs [K] where there is one."""


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of x (Bengio et al. 2013)."""
    return x + (rounded - x).detach()


def in_bfloat16(x: Tensor) -> Tensor:
    """x as bfloat16 holds it, in float32, with the gradient of x."""
    return straight_through(x, x.to(torch.bfloat16).float())
