"""Magnitude pruning: the smallest weights go (Han et al. 2015, n:m form of Zhou et al. 2021)."""

from torch import Tensor

from slimfx.methods.masks import keep_largest
from slimfx.methods.stats import Stats


def magnitude(weight: Tensor, stats: Stats, *, n: int, m: int) -> Tensor:
    """Keep the n of m weights with the largest |W_ij|; `stats` is not used."""
    return keep_largest(weight.abs(), n=n, m=m)
