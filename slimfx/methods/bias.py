"""Bias correction: what compression adds to a layer's mean output, taken off its bias.

b' = b + (W - Wc) E[x]   (Nagel et al. 2019, section 4.2)
"""

from torch import Tensor

from slimfx.methods.stats import Stats


def mean_error(W: Tensor, dense: Tensor, stats: Stats) -> Tensor:
    """Float32 [N], to be added to the bias of the layer whose weight W [N, K] became `dense`."""
    return (W.float() - dense.float()) @ stats.mean
