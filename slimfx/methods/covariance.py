"""The covariance of a layer's inputs, made safe to invert."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(H: Tensor, share: float = 0.01) -> Tensor:
    """H brought to a mean diagonal of one, plus `share` of the identity.

    The identity alone where no input was ever non-zero. No method changes when H is scaled.
    """
    mean = H.diagonal().mean()
    identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
    return H / mean + share * identity if mean > 0 else identity


def inverse_factor(H: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1, in float32; solved in float64 where float32 fails.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite in float64 either.
    """
    for dtype in (H.dtype, torch.float64):
        L, failed = torch.linalg.cholesky_ex(H.to(dtype))
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not failed and U.isfinite().all():
            return U.to(H.dtype)
    raise torch.linalg.LinAlgError("the covariance of the inputs is not positive definite")
