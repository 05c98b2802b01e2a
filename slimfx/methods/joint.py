"""Sparse, quantized and low-rank parts solved together against the full covariance.

    min over Q in n:m int4, L, R of  trace((W - Q - R L) H (W - Q - R L)^T)

alternates (a) Q for the target W - R L, by `second_order` and then `descend`, and (b) R, L for
W - Q, rounded as they will be stored, so that the next Q takes up their rounding. A last
descent follows the last adapter. The iterate with the smallest error is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from slimfx.methods.descend import descend
from slimfx.methods.full_lora import low_rank_under
from slimfx.methods.quantized import Quantized
from slimfx.methods.second_order import second_order

Stored = TypeVar("Stored")
_WARM = 3  # of four rounds, so many solve Q afresh; the others start from the Q they have
_SWEEPS = 2


class Joint(NamedTuple, Generic[Stored]):
    """A weight's two parts; L and R are None at rank 0."""

    Q: Quantized
    L: Stored | None
    R: Stored | None


def joint(
    W: Tensor,
    H: Tensor,
    *,
    rank: int,
    rounds: int,
    scale_of: Callable[[Tensor], Tensor],
    store: Callable[[Tensor], Stored],
    as_float: Callable[[Stored], Tensor],
    group: int,
    bits: int,
    n: int,
    m: int,
) -> Joint[Stored]:
    """The best of `rounds` alternations.

    Args:
        H: damped covariance of the inputs [K, K].
        scale_of: the scale for a target [N, K]; `store` and `as_float`: an adapter as it is kept.
        group, bits, n, m: of Q, as in `second_order`.
    """
    low_rank = torch.zeros_like(W)
    scale = scale_of(W)
    L = R = None
    best, least = None, float("inf")

    def remember(Q: Quantized) -> None:
        nonlocal best, least
        E = W - Q.dense() - low_rank
        error = ((E @ H) * E).sum().item()
        if best is None or error < least:
            best, least = Joint(Q, L, R), error

    Q = None
    for done in range(rounds):
        if Q is None or 4 * done < _WARM * rounds:
            scale = scale_of(W - low_rank)
            Q = second_order(W - low_rank, H, scale, group=group, bits=bits, n=n, m=m)
        Q = descend(W - low_rank, H, Q, bits=bits, n=n, m=m, sweeps=_SWEEPS)
        remember(Q)
        if not rank:
            break
        L, R = (store(part) for part in low_rank_under(W - Q.dense(), H, rank))
        low_rank = as_float(R) @ as_float(L)
        remember(Q)
    assert best is not None and Q is not None
    if rank:
        remember(descend(W - low_rank, H, Q, bits=bits, n=n, m=m, sweeps=_SWEEPS))
    return best
