"""Alternation of a compressed weight with its low-rank part, the least error of all kept.

    S <- compress(W - R L),     L, R <- compensate(W - S)

The papers that do so differ in the two steps and in which comes first:

- LoftQ (Li et al. 2023, algorithm 1): quantized first; `compensate` the SVD.
- LQ-LoRA (Guo et al. 2023, algorithm 1): low rank of W first; the SVD, or one weighed by the
  inputs; stops when the error first rises, where the iterate before is kept.
- OATS (Zhang and Papyan 2024): low rank first; both in the coordinates W diag(rms),
  so `compress` is Wanda's mask and `compensate` QERA-approx.
- LoSparse (Li et al. 2023), its initialisation: low rank of W first, one round.
- CALDERA (Saha et al. 2024, algorithm 1): quantized first, second order; `compensate` LPLR, which
  rounds the adapters as they are stored; the least error of all rounds is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimfx.methods.quantized import Parts, Quantized, as_float

Stored = Quantized | Tensor


def alternate(
    W: Tensor,
    *,
    compress: Callable[[Tensor], Stored],
    compensate: Callable[[Tensor], tuple[Stored, Stored]],
    error: Callable[[Tensor], float],
    rounds: int,
    low_rank_first: bool,
) -> Parts:
    """The parts with the least error after any step, from the first that has both; ties: earlier.

    Args:
        compress: from a target [N, K] to the weight as it is stored.
        compensate: from what that leaves [N, K] to L [r, K] and R [N, r] as they are stored.
        error: of a residual W - weight - R L [N, K].
        rounds: how often each step is taken, at least once.
        low_rank_first: start with compensate(W) instead of compress(W).
    """
    weight: Stored = torch.zeros_like(W)
    low_rank = torch.zeros_like(W)
    L: Stored | None = None
    R: Stored | None = None
    best, least = None, float("inf")
    for step in range(2 * rounds):
        if (step % 2 == 0) == low_rank_first:
            L, R = compensate(W - as_float(weight))
            low_rank = as_float(R) @ as_float(L)
        else:
            weight = compress(W - low_rank)
        if step:
            now = error(W - as_float(weight) - low_rank)
            if best is None or now < least:
                best, least = Parts(weight, L, R), now
    assert best is not None  # at least one round
    return best
