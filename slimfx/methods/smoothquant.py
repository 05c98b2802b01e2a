"""SmoothQuant: input scales that share the range of an input channel with its weights.

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)     (Xiao et al. 2022, eq. 4)

The layer multiplies its input by c = 1/s and stores W / c, so that at alpha = 1/2 channel j of both
reaches as far: sqrt(max|x_j| max|W_j|).
"""

import torch
from torch import Tensor

from slimfx.methods.stats import Stats

_LEAST, _MOST = 1e-5, 1e5  # c; the authors clamp s at the first


def smoothquant(weight: Tensor, stats: Stats, *, alpha: float = 0.5) -> Tensor:
    """c [K], positive, float32 that bfloat16 holds exactly.

    A channel that was zero in every token, or whose weights are all zero, has c = 1.
    """
    x = stats.peak
    w = weight.detach().abs().amax(0).double()
    c = w.pow(1 - alpha) / x.pow(alpha)
    c = torch.where((x > 0) & (w > 0), c.clamp(_LEAST, _MOST), 1.0)
    return c.to(torch.bfloat16).float()
