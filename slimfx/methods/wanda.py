"""Wanda: weights are weighed by the norm of the input they multiply (Sun et al. 2023)."""

from torch import Tensor

from slimfx.methods.stats import Stats


def wanda(weight: Tensor, stats: Stats) -> Tensor:
    """The score |W_ij| * ||X_j||_2 (Sun et al. 2023, eq. 1)."""
    return weight.abs() * stats.rms
