"""Magnitude pruning: the smallest weights go (Han et al. 2015, n:m form of Zhou et al. 2021)."""

from torch import Tensor

from slimfx.methods.stats import Stats


def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """The score |W_ij|; `stats` is not used."""
    return weight.abs()
