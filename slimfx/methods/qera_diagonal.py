"""QERA-approx: low-rank compensation for inputs whose channels are uncorrelated.

    min E||(E - R L) x||^2 = ||(E - R L) S||_F^2,     S = diag(sqrt(E[x_j^2]))

(Zhang et al. 2024, "QERA", arXiv 2410.06040, theorem 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimfx.methods.low_rank import low_rank_weighed
from slimfx.methods.stats import Stats


def qera_diagonal(
    error: Tensor, stats: Stats, *, rank: int, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """L [r, K], R [N, r] for the error [N, K]: R = U of E S, L = U^T E, which equals U^T E S S^-1.

    A channel that was zero in every token weighs as much as the least of the others; where all
    were, S is the identity.
    """
    rms = stats.rms
    alive = rms[rms > 0]
    S = torch.where(rms > 0, rms, alive.min()) if len(alive) else torch.ones_like(rms)
    return low_rank_weighed(error, S, rank, fast=fast)
