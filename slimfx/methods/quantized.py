"""Symmetric integer codes with a scale: W ~ code * scale, |code| < 2^(bits-1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
"""The widths codes may have."""


@dataclass(frozen=True)
class Quantized:
    """A matrix [N, K] as int8 codes and bfloat16 scales.

    `scale` is [1, 1] (one per tensor), [N, 1] (per output channel) or [N, ceil(K / group)]; column
    j of the codes is multiplied by column j // group of the scale.
    """

    codes: Tensor
    scale: Tensor
    group: int

    def dense(self) -> Tensor:
        """The float32 matrix [N, K] the codes stand for."""
        return self.codes.float() * spread(self.scale.float(), self.group, self.codes.shape[1])


class Parts(NamedTuple):
    """A compressed weight [N, K] ~ weight + R @ L; L and R are None where there is no adapter."""

    weight: Quantized | Tensor
    L: Quantized | Tensor | None
    R: Quantized | Tensor | None

    def dense(self) -> Tensor:
        """The float32 matrix [N, K] the parts stand for."""
        if self.L is None or self.R is None:
            return as_float(self.weight)
        return as_float(self.weight) + as_float(self.R) @ as_float(self.L)


def as_float(matrix: Quantized | Tensor) -> Tensor:
    """A stored matrix as float32, whether it has codes or is floating point itself."""
    return matrix.dense() if isinstance(matrix, Quantized) else matrix.float()


def largest_code(bits: int) -> int:
    """The largest code of a symmetric `bits`-bit integer: 7 for 4 bits."""
    return 2 ** (bits - 1) - 1


def spread(scale: Tensor, group: int, width: int) -> Tensor:
    """Repeat a scale along K so that it multiplies a matrix [N, K] element by element."""
    if scale.shape[1] == 1:
        return scale
    return scale.repeat_interleave(group, dim=1)[:, :width]


def quantize(weight: Tensor, scale: Tensor, *, group: int, bits: int) -> Quantized:
    """Round `weight` [N, K] to the nearest code (ties to even); a zero scale gives zero codes."""
    scale = scale.to(torch.bfloat16)
    step = spread(scale.float(), group, weight.shape[1])
    ratio = torch.where(step > 0, weight.float() / step, torch.zeros((), device=weight.device))
    top = largest_code(bits)
    codes = ratio.round().clamp_(-top, top).to(torch.int8)
    return Quantized(codes=codes, scale=scale, group=group)
