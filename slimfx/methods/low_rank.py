"""The best rank-r matrix under a residual: from the smaller Gram matrix instead of a full SVD."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors L [r, K], R [N, r] with R @ L the best rank-r approximation of `error` [N, K].

    E E^T = U S^2 U^T is solved on the smaller side (Eckart-Young-Mirsky); R has orthonormal
    columns and L carries the singular values, so that grouped integer scales lose little on either.
    """
    peak = error.abs().max().float()
    E = error.float() / peak if peak > 0 else error.float()  # so that squares stay in range
    if E.shape[0] <= E.shape[1]:
        _, U = torch.linalg.eigh(E @ E.T)  # eigenvalues ascend
        R = U[:, -rank:].flip(1).contiguous()
        return peak * (R.T @ E), R
    _, V = torch.linalg.eigh(E.T @ E)
    V = V[:, -rank:].flip(1)
    US = E @ V  # [N, r], columns are singular values times left vectors
    S = US.norm(dim=0)
    alive = S.max() * torch.finfo(S.dtype).eps < S
    R = torch.where(alive, US / S.clamp_min(1e-30), 0.0)
    return peak * S[:, None] * V.T, R
