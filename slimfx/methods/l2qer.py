"""L2QER: low-rank compensation of the error as the mean magnitude of the inputs weighs it.

    min ||(E - R L) S||_F,     S = diag(a / sqrt(min a max a)),  a_j = mean |x_j|

(Zhang et al. 2024, "LQER", arXiv 2402.02446, section 3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimfx.methods.low_rank import low_rank_weighed
from slimfx.methods.stats import Stats


def l2qer(error: Tensor, stats: Stats, *, rank: int, fast: bool = False) -> tuple[Tensor, Tensor]:
    """L [r, K], R [N, r] for the error [N, K]: R = U of E S, L = U^T E, which equals U^T E S S^-1.

    A channel that was zero in every token weighs as much as the least of the others (the authors
    clamp a at 1e-4, which depends on the units of x); where all were, S is the identity.
    """
    a = stats.mean_abs
    alive = a[a > 0]
    if len(alive):
        a = torch.where(a > 0, a, alive.min()) / (alive.min().sqrt() * alive.max().sqrt())
    else:
        a = torch.ones_like(a)
    return low_rank_weighed(error, a, rank, fast=fast)
