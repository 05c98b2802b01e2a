"""Absmax scales: the largest |w| of a tensor, a channel or a group becomes the largest code."""

import torch
from torch import Tensor

from slimfx.methods.quantized import largest_code


def absmax(weight: Tensor, *, bits: int, granularity: str, group: int) -> Tensor:
    """Scale = max|w| / (2^(bits-1) - 1), rounded to bfloat16.

    Returns [1, 1] for "tensor", [N, 1] for "channel", [N, ceil(K / group)] for "group" (the last
    group of a row may be shorter).
    """
    magnitude = weight.float().abs()
    if granularity == "tensor":
        peak = magnitude.amax().reshape(1, 1)
    elif granularity == "channel":
        peak = magnitude.amax(1, keepdim=True)
    else:
        short = -magnitude.shape[1] % group
        padded = torch.nn.functional.pad(magnitude, (0, short))
        peak = padded.unflatten(1, (-1, group)).amax(-1)
    return (peak / largest_code(bits)).to(torch.bfloat16)
