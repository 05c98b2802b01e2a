"""Low-rank compensation against the full covariance of the inputs (QERA exact, EoRA)."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfx.methods.covariance import damped
from slimfx.methods.eigenvectors import leading_eigenvectors
from slimfx.methods.stats import Stats


def full_lora(
    error: Tensor, stats: Stats, *, rank: int, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """L [r, K], R [N, r] minimising the error of the layer's output over the calibration tokens."""
    return low_rank_under(error, damped(stats.covariance), rank, fast=fast)


def low_rank_under(
    error: Tensor, H: Tensor, rank: int, *, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """L [r, K], R [N, r] minimising trace((E - R L) H (E - R L)^T) (Zhang et al. 2024, theorem 1).

    With U the leading left singular vectors of E H^(1/2), the best rank-r part of that product is
    U U^T E H^(1/2); so R = U and L = U^T E, and no root or inverse of H is needed. U comes from the
    smaller of E H E^T and S^T E^T E S, where H = S S^T. H must be positive definite (`damped`).
    `fast` is that of `leading_eigenvectors`.
    """
    peak = error.abs().max().float()
    E = error.float() / peak if peak > 0 else error.float()  # so that squares stay in range
    if E.shape[0] <= E.shape[1]:
        R = leading_eigenvectors(E, rank, H=H, fast=fast)
    else:
        ES = E @ torch.linalg.cholesky(H)
        R, _ = torch.linalg.qr(ES @ leading_eigenvectors(ES.T, rank, fast=fast))
    return peak * (R.T @ E), R


def left_by_rank(error: Tensor, covariance: Tensor, weights: Tensor) -> Tensor:
    """sum_n w_n (E C E^T)_nn that the best adapter of each rank leaves: float64 [min(N, K) + 1].

    C [K, K] is damped; the adapter is the best for equal weights [N], as `low_rank_under` finds it:
    with E S = U diag(s) V^T and C = S S^T, its rank r leaves sum_(i > r) s_i^2 sum_n w_n U_ni^2.
    """
    E, C = error.float(), damped(covariance)
    if E.shape[0] <= E.shape[1]:
        energies, U = torch.linalg.eigh(E @ C @ E.T)
        parts = U.square() * energies.clamp_min(0)
    else:
        ES = E @ torch.linalg.cholesky(C)
        parts = (ES @ torch.linalg.eigh(ES.T @ ES).eigenvectors).square()
    weighed = (weights.to(parts) @ parts).double()  # smallest energy first
    left = torch.cat([weighed.new_zeros(1), weighed.cumsum(0)]).flip(0)
    return left * covariance.diagonal().mean().double()
