"""AWQ: input scales found by a grid search on the error of the layer's output.

    s_j = (mean |x_j|)^alpha,     alpha* = argmin || (Q(W diag(s)) diag(s)^-1 - W) X ||

over alpha = 0, 1/steps, ... 1 (Lin et al. 2023, eq. 4 and 5). The layer multiplies its input by
c = 1/s and stores Q(W / c).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimfx.methods.stats import Stats

_LEAST = 1e-4  # of the largest s; the authors clamp s itself at this


def awq(
    weight: Tensor, stats: Stats, *, quantize: Callable[[Tensor], Tensor], steps: int = 20
) -> Tensor:
    """c [K] with the least trace(E H E^T), E = W - Q(W / c) c: float32 that bfloat16 holds exactly.

    c is positive, sqrt(max c * min c) is 1 before rounding, and a channel that was zero in every
    token has c = 1. Ties go to the smaller alpha; alpha = 0 is c = 1. `stats` must hold the
    covariance.

    Args:
        quantize: from W / c [N, K] to the float32 values that are stored for it.
    """
    W, H = weight.float(), stats.covariance
    best, least = torch.ones_like(stats.mean_abs), float("inf")
    for step in range(steps + 1):
        c = _input_scales(stats, step / steps)
        E = W - quantize(W / c) * c
        error = ((E @ H) * E).sum().item()
        if error < least:
            best, least = c, error
    return best


def _input_scales(stats: Stats, alpha: float) -> Tensor:
    mean = stats.mean_abs.double()
    if stats.dead.all():
        return torch.ones_like(stats.mean_abs)
    s = (mean / mean.max()).pow(alpha).clamp_min(_LEAST)
    alive = s[~stats.dead]
    c = (alive.max() * alive.min()).sqrt() / s
    return torch.where(stats.dead, 1.0, c).to(torch.bfloat16).float()
