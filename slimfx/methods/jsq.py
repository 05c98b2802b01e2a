"""JSQ pruning: weights whose removal would narrow the range of an output go first.

    S_ij = |W_ij| ||X_j||_2 + rho A_ij,     A_ij = max_t Y_ti - min_t Y_ti  with W_ij taken out

(Guo et al. 2024, "Compressing Large Language Models by Joint Sparsification and Quantization", as
their code computes it, rho = 2.1). A Wanda score alone keeps the outliers that spoil a quantizer's
range. Statistics hold no tokens, so the range is taken as that of T normal values of the same
variance: with C the covariance of x about its mean, z the mean of the largest of T normal values,

    A_ij ~ 2 z sqrt((W C W^T)_ii - 2 W_ij (W C)_ij + W_ij^2 C_jj)

T is the authors' 128 samples of 2048 tokens whatever the calibration's size, because rho weighs a
term that grows as sqrt(T) against one that hardly grows. (Their code takes ||X_j|| per sample and A
over inputs averaged across samples, which comes to about the same balance.)
"""

import torch
from torch import Tensor

from slimfx.methods.stats import Stats

_T = 128 * 2048


def jsq(weight: Tensor, stats: Stats, *, rho: float = 2.1) -> Tensor:
    """The score S / sqrt(T) [N, K], float32; `stats` must hold the covariance."""
    W = weight.float()
    C = stats.covariance - torch.outer(stats.mean, stats.mean)
    WC = W @ C
    whole = (WC * W).sum(1, keepdim=True)
    variance = (whole - 2 * W * WC + W.square() * C.diagonal()).clamp_min(0)
    quantile = torch.tensor((_T - 0.375) / (_T + 0.25), dtype=torch.float64)
    z = torch.special.ndtri(quantile).item()  # Blom's estimate
    return W.abs() * stats.rms + rho * 2 * z / _T**0.5 * variance.sqrt()
