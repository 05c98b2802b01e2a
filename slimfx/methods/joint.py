"""Sparse, quantized and low-rank parts solved together against the full covariance.

    min over Q, L, R of  trace((W - Q - R L) H (W - Q - R L)^T)

alternates (a) Q, sparse or in codes or both, for the target W - R L, and (b) R, L for W - Q,
rounded as they will be stored, so that the next Q takes up their rounding. The first target is W,
or what the best R, L for W itself leave of it, whichever ends the first round with the smaller
error. Q is solved afresh by `second_order` in most rounds, so that its mask keeps moving, then
refined by `descend`. The best iterate is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimfx.methods.covariance import inverse_factor
from slimfx.methods.descend import descend
from slimfx.methods.masks import Pattern
from slimfx.methods.quantized import Parts, Quantized, as_float
from slimfx.methods.second_order import second_order

Stored = Quantized | Tensor
_AFRESH = 0.75  # share of the rounds that solve Q afresh
_SWEEPS = 2  # of descent in each of the other rounds
_LAST_SWEEPS = 4  # of descent after the last adapter


def joint(
    W: Tensor,
    H: Tensor,
    *,
    rank: int,
    rounds: int,
    scale_of: Callable[[Tensor], Tensor] | None,
    fit: Callable[[Tensor, Tensor], tuple[Stored, Stored]],
    group: int,
    bits: int,
    pattern: Pattern | None,
) -> Parts:
    """The best of `rounds` alternations; at rank 0 one solution and its descent.

    Args:
        H: damped covariance of the inputs [K, K].
        scale_of: the scale for a target [N, K]; None leaves Q in float32.
        fit: (error [N, K], H) -> L [rank, K], R [N, rank] as they will be stored.
        group, bits, pattern: of Q, as in `second_order`.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    W = W.float()
    U = inverse_factor(H)
    nothing = torch.zeros_like(W)

    def error(parts: Parts) -> float:
        E = W - parts.dense()
        return ((E @ H) * E).sum().item()

    def with_adapter(Q: Stored) -> Parts:
        return Parts(Q, *fit(W - as_float(Q), H)) if rank else Parts(Q, None, None)

    def target(parts: Parts) -> Tensor:
        return W - parts._replace(weight=nothing).dense()

    def afresh(parts: Parts) -> Stored:
        T = target(parts)
        scale = None if scale_of is None else scale_of(T)
        return second_order(T, H, scale, group=group, bits=bits, pattern=pattern, U=U)

    def refined(parts: Parts, sweeps: int) -> Stored:
        return descend(target(parts), H, parts.weight, bits=bits, pattern=pattern, sweeps=sweeps)

    starts = [Parts(nothing, None, None)] + ([with_adapter(nothing)] if rank else [])
    parts = best = min((with_adapter(afresh(start)) for start in starts), key=error)
    for done in range(1, rounds if rank else 1):
        solve_anew = done < _AFRESH * rounds
        parts = with_adapter(afresh(parts) if solve_anew else refined(parts, _SWEEPS))
        best = min(best, parts, key=error)
    return min(best, parts._replace(weight=refined(parts, _LAST_SWEEPS)), key=error)
