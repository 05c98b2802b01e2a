"""Wanda: weights are weighed by the norm of the input they multiply (Sun et al. 2023)."""

from torch import Tensor

from slimfx.methods.masks import keep_largest
from slimfx.methods.stats import Stats


def wanda(weight: Tensor, stats: Stats, *, n: int, m: int) -> Tensor:
    """Keep the n of m weights with the largest |W_ij| * ||X_j||_2 (Sun et al. 2023, eq. 1)."""
    return keep_largest(weight.abs() * stats.rms, n=n, m=m)
