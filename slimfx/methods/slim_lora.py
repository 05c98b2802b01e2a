"""SLiM-LoRA: low-rank compensation of the error as the activations weigh it."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfx.methods.low_rank import low_rank_weighed
from slimfx.methods.stats import Stats


def slim_lora(
    error: Tensor, stats: Stats, *, rank: int, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """L [r, K], R [N, r] minimising ||(W - Wc - R L) diag(x)||_F (arXiv 2410.09615, section 3.2).

    The paper writes W as [in, out] and x W + x L R; here W is [out, in], so L acts on the input
    first. x is the saliency: mean |x_j| shifted by its smallest value, which keeps diag(x)
    invertible.
    """
    return low_rank_weighed(error, saliency(stats), rank, fast=fast)


def saliency(stats: Stats) -> Tensor:
    """mean |x_j| + min_j mean |x_j|, float32 [K], all positive.

    The minimum is taken over the channels that are alive; a dead channel gets that minimum alone,
    and a layer that never saw a non-zero input gets ones (which is naive low rank).
    """
    mean = stats.mean_abs
    alive = mean[mean > 0]
    return mean + alive.min() if len(alive) else torch.ones_like(mean)
