"""SLiM-Quant^O: the input channels that matter most are rounded on a finer grid.

The channels with the largest |diag(x) W|, x the mean of |x_j|, have their weights multiplied by a
factor before they are quantized and their input divided by it (arXiv 2410.09615, section 3.1): the
scale of the codes hardly changes, and the error of these channels shrinks by the factor.
"""

import torch
from torch import Tensor

from slimfx.methods.stats import Stats


def salient_channels(
    weight: Tensor, stats: Stats, *, share: float = 0.01, factor: float = 2.0
) -> Tensor:
    """c [K]: 1/factor for the max(1, round(share K)) salient channels, 1 for the others.

    The layer multiplies its input by c and stores W / c. The saliency of channel j is mean|x_j|
    times the norm of column j of W; ties go to the lower index. c is float32 that bfloat16 holds
    exactly.
    """
    K = weight.shape[1]
    saliency = stats.mean_abs * weight.detach().float().norm(dim=0)
    salient = saliency.argsort(descending=True, stable=True)[: max(1, round(share * K))]
    c = torch.ones(K, device=weight.device)
    c[salient] = 1 / factor
    return c.to(torch.bfloat16).float()
