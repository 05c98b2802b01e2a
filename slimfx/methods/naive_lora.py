"""Naive low-rank compensation: the truncated SVD of the compression error."""

from __future__ import annotations

from torch import Tensor

from slimfx.methods.low_rank import low_rank
from slimfx.methods.stats import Stats


def naive_lora(
    error: Tensor, stats: Stats, *, rank: int, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """L [r, K], R [N, r] minimising ||W - Wc - R L||_F; `stats` is not used."""
    return low_rank(error, rank, fast=fast)
