"""SLiM-Quant^W as the paper computes it: a histogram of |w| and a two-stage grid search."""

import torch
from torch import Tensor

from slimfx.methods.quantized import largest_code

_COARSE = 10  # grid points of the first stage, as in the authors' multi-grid search


def slim_histogram(weight: Tensor, *, bits: int, granularity: str, group: int) -> Tensor:
    """The bfloat16 scale [1, 1] that minimises the histogram estimate of the error.

    E(alpha) = integral_0^alpha f(x) (x - round(x / s) s)^2 dx + integral_alpha^inf f(x) (x -
    alpha)^2 dx with s = alpha / (2^(bits-1) - 1) (arXiv 2410.09615, eq. 4-6). alpha runs over the
    bin centres: every tenth of the range first, then all between the neighbours of the best.
    """
    magnitude = weight.detach().flatten().abs().float()
    peak = magnitude.max()
    if peak == 0:
        return torch.zeros(1, 1, dtype=torch.bfloat16, device=weight.device)
    bins = max(512, min(magnitude.numel() // 1000, 20000))
    edges = torch.linspace(0, peak.item(), bins + 1, dtype=torch.float64, device=weight.device)
    centres = (edges[:-1] + edges[1:]) / 2
    density = torch.histc(magnitude, bins, 0, peak.item()).double()

    def error(index: int) -> float:
        alpha = centres[index]
        scale = alpha / largest_code(bits)
        value = ((centres / scale).round() * scale).clamp(max=alpha.item())
        return (density * (centres - value).square()).sum().item()

    stride = max(bins // _COARSE, 1)
    coarse = min(range(stride - 1, bins, stride), key=error)
    best = min(range(max(coarse - stride, 0), min(coarse + stride, bins)), key=error)
    return (centres[best] / largest_code(bits)).to(torch.bfloat16).reshape(1, 1)
