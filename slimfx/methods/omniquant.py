"""OmniQuant's learned clipping: how far below absmax each scale lies, found by gradient descent.

    scale = sigmoid(gamma) max|W| / (2^(bits-1) - 1)

(Shao et al. 2023, eq. 2, in its symmetric form), one gamma for each scale, starting at 4.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.learnable import Learnable, Values, in_bfloat16, straight_through
from slimfx.methods.quantized import Parts, Quantized, largest_code, quantize, spread

_START = 4.0  # sigmoid(4) = 0.98


def learned_clipping(
    W: Tensor, mask: Tensor | None, *, bits: int, granularity: str, group: int
) -> Learnable:
    """Codes for W [N, K] where `mask` allows them, with one learned scale for each of absmax's."""
    scale_of = partial(clipped_scale, W, bits=bits, granularity=granularity, group=group)
    full = absmax(W, bits=bits, granularity=granularity, group=group)

    def finish(values: Values) -> tuple[Parts, Tensor | None]:
        scale = scale_of(values["gamma"]).to(torch.bfloat16)
        return Parts(masked(quantize(W, scale, group=group, bits=bits), mask), None, None), None

    return Learnable(
        values={"gamma": torch.full_like(full, _START, dtype=torch.float32)},
        weight=lambda values: rounded(W, mask, scale_of(values["gamma"]), bits, group),
        finish=finish,
    )


def clipped_scale(W: Tensor, gamma: Tensor, *, bits: int, granularity: str, group: int) -> Tensor:
    """The scale for each gamma, float32 that bfloat16 holds, with gradients to both."""
    full = absmax(W, bits=bits, granularity=granularity, group=group).float()
    return in_bfloat16(gamma.sigmoid() * full)


def rounded(W: Tensor, mask: Tensor | None, scale: Tensor, bits: int, group: int) -> Tensor:
    """W on the grid of the scale, with gradients to both, as `quantize` rounds it."""
    step = spread(scale, group, W.shape[1])
    top = largest_code(bits)
    ratio = torch.where(step > 0, W / step.clamp_min(1e-38), 0.0).clamp(-top, top)
    code = straight_through(ratio, ratio.round())
    return code * step if mask is None else code * step * mask


def masked(coded: Quantized, mask: Tensor | None) -> Quantized:
    """The same with zero codes outside the mask."""
    return coded if mask is None else Quantized(coded.codes * mask, coded.scale, coded.group)
