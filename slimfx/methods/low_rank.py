"""The best rank-r matrix under a residual, from the smaller Gram matrix instead of a full SVD.

E E^T = U S^2 U^T, so that R = U[:, :r] and L = R^T E (Eckart-Young-Mirsky).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimfx.methods.eigenvectors import leading_eigenvectors, product_dtype


def low_rank(error: Tensor, rank: int, *, fast: bool = False) -> tuple[Tensor, Tensor]:
    """Factors L [r, K], R [N, r] with R @ L the best rank-r approximation of `error` [N, K].

    R has orthonormal columns and L carries the singular values, so that grouped integer scales
    lose little on either. `fast` leaves at most about 0.5% more of ||E - R L||_F^2 than the best
    (see `leading_eigenvectors`).
    """
    unit = _unit(error)
    E = error.float() if unit == 1 else error.float() / unit
    dtype = product_dtype(E, fast=fast)
    if E.shape[0] <= E.shape[1]:
        R = leading_eigenvectors(E, rank, fast=fast)
        return unit * (R.T.to(dtype) @ E.to(dtype)).float(), R
    V = leading_eigenvectors(E.T, rank, fast=fast)
    R, S = torch.linalg.qr(E @ V)  # S [r, r] is diagonal up to rounding
    return unit * (S @ V.T), R


def low_rank_weighed(
    error: Tensor, weights: Tensor, rank: int, *, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """Factors as `low_rank`, minimising ||(E - R L) diag(weights)||_F for positive weights [K].

    L = R^T E equals R^T E S S^-1 with S = diag(weights), without dividing by a small weight.
    """
    _, R = low_rank(error.float() * weights, rank, fast=fast)
    return R.T @ error.float(), R


def _unit(error: Tensor) -> float:
    """What to divide by so that squares stay in range: 1 for most, which spares the copy."""
    low, high = torch.aminmax(error)
    peak = max(-low.item(), high.item())
    return peak if 0 < peak < 1e-12 or peak > 1e12 else 1.0
