"""LPLR: low-rank factors in few bits, each fitted anew to the other as it is stored.

    min over L, R in stored form of  trace((E - R L) H (E - R L)^T)

alternates the two closed forms  L = (R^T R)^-1 R^T E  and  R = E H L^T (L H L^T)^-1  and stores
each at once, so that either factor takes up the rounding of the other (Saha et al. 2023, algorithm
1; with the covariance as in Saha et al. 2024, CALDERA, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.linalg import pinv

from slimfx.methods.covariance import damped
from slimfx.methods.full_lora import low_rank_under
from slimfx.methods.quantized import Quantized, as_float
from slimfx.methods.stats import Stats

Stored = Quantized | Tensor
_ROUNDS = 2


def lplr(
    error: Tensor, stats: Stats, *, rank: int, store: Callable[[Tensor], Stored]
) -> tuple[Stored, Stored]:
    """L [r, K], R [N, r] as `store` keeps them, for the damped covariance of `stats`."""
    return lplr_under(error, damped(stats.covariance), rank, store)


def lplr_under(
    error: Tensor, H: Tensor, rank: int, store: Callable[[Tensor], Stored]
) -> tuple[Stored, Stored]:
    """The best of a few alternations from the optimum before rounding (`low_rank_under`)."""
    E = error.float()
    EH = E @ H
    L, R = (store(part) for part in low_rank_under(E, H, rank))
    best, least = (L, R), _left(E, H, L, R)
    for _ in range(_ROUNDS):
        r = as_float(R)
        L = store(pinv(r.T @ r, hermitian=True) @ (r.T @ E))
        l = as_float(L)  # noqa: E741
        R = store(EH @ l.T @ pinv(l @ H @ l.T, hermitian=True))
        left = _left(E, H, L, R)
        if left < least:
            best, least = (L, R), left
    return best


def _left(E: Tensor, H: Tensor, L: Stored, R: Stored) -> float:
    left = E - as_float(R) @ as_float(L)
    return float(((left @ H) * left).sum())
