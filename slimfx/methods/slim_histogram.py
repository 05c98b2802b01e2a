"""SLiM-Quant^W as the paper computes it: a histogram of |w| and a two-stage grid search.

    E(alpha) =  integral_0^alpha   f(x) (x - round(x / s) s)^2 dx
              + integral_alpha^inf f(x) (x - alpha)^2 dx,   s = alpha / (2^(bits-1) - 1)

(arXiv 2410.09615, eq. 4-6). Two things differ from the authors' code, which can be off by half
without them: f is constant within a bin and integrated exactly there (8-bit steps are as narrow as
bins, and the values at their centres alias), and the coarse grid goes on in octaves below its
first tenth (where the optimum of a heavy tail lies).
"""

import torch
from torch import Tensor

from slimfx.methods.quantized import largest_code

_COARSE = 10  # grid points of the first stage, as in the authors' multi-grid search


def slim_histogram(weight: Tensor, *, bits: int, granularity: str, group: int) -> Tensor:
    """The bfloat16 scale [1, 1] that minimises the histogram estimate of the squared error.

    alpha runs over the bin centres: every tenth of the range and the octaves below first, then all
    between the neighbours of the best. `granularity` must be "tensor" (the recipe checks it).
    """
    magnitude = weight.detach().flatten().abs().float()
    peak = magnitude.max()
    if peak == 0:
        return torch.zeros(1, 1, dtype=torch.bfloat16, device=weight.device)
    bins = max(512, min(magnitude.numel() // 1000, 20000))
    edges = torch.linspace(0, peak.item(), bins + 1, dtype=torch.float64, device=weight.device)
    centres = (edges[:-1] + edges[1:]) / 2
    density = torch.histc(magnitude, bins, 0, peak.item()).double()
    top = largest_code(bits)

    def error(index: int) -> float:
        s = centres[index] / top
        code = (edges / s).round().clamp(max=top)
        up_to = code * s**3 / 12 + (edges - code * s) ** 3 / 3  # integral from 0 to each edge
        return (density * up_to.diff()).sum().item()

    grid = _coarse(bins)
    coarse = min(range(len(grid)), key=lambda i: error(grid[i]))
    first, last = grid[max(coarse - 1, 0)], grid[min(coarse + 1, len(grid) - 1)]
    best = min(range(first, last + 1), key=error)
    return (centres[best] / top).to(torch.bfloat16).reshape(1, 1)


def _coarse(bins: int) -> list[int]:
    """Indices of the first stage, ascending: bin 0, octaves, then every tenth of the range."""
    stride = bins // _COARSE
    octaves = [(stride >> k) - 1 for k in range(1, stride.bit_length())]
    return sorted({*octaves, *range(stride - 1, bins, stride), bins - 1})
