"""SparseGPT and OPTQ: column by column, each error passed on to the columns that are left.

With H = X^T X / tokens and U the upper Cholesky factor of H^-1, column j is replaced by its stored
value q_j and the columns behind it take up the rest (Frantar and Alistarh 2023, eq. 3 and
algorithm 1; Frantar et al. 2022, algorithm 1):

    W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:]

Without pruning this is OPTQ, without scales SparseGPT, with both the two in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimfx.methods.covariance import inverse_factor
from slimfx.methods.masks import NofM, Pattern, Unstructured, keep
from slimfx.methods.quantized import Quantized, largest_code, spread

_BLOCK = 128  # columns updated together before the rest of the row is
_TOGETHER = 16  # columns whose mask is chosen at once, where the pattern has no groups


def second_order(
    W: Tensor,
    H: Tensor,
    scale: Tensor | None,
    *,
    group: int,
    bits: int,
    pattern: Pattern | None,
    U: Tensor | None = None,
) -> Quantized | Tensor:
    """Stored values for W [N, K] that keep ||(W - Q) X|| small, in `pattern`; None keeps all.

    Args:
        H: damped covariance of the inputs [K, K].
        scale: as in `Quantized`; None rounds nothing, and the result is float32 with exact zeros.
        U: `inverse_factor(H)`, for who has it already.

    The mask is chosen by w^2 / U_jj^2 when a column's turn comes, for the m columns of a group or,
    where a share of the weights goes, for a few columns at a time: as many stay as of the same
    columns (and row) when W as it is given is pruned by that score, so that the total is exact.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    K = W.shape[1]
    U = inverse_factor(H) if U is None else U
    U, diagonal = U / U.diagonal()[:, None], U.diagonal()
    first = keep((W.float() / diagonal).square(), pattern).T
    left = W.float().T.clone(memory_format=torch.contiguous_format)  # [K, N]: see `descend`
    step = left.new_ones(1, 1) if scale is None else spread(scale.float(), group, K).T
    step = step.expand(K, -1)
    top = None if scale is None else largest_code(bits)
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    width = pattern.m if isinstance(pattern, NofM) else _TOGETHER
    block = max(_BLOCK // width, 1) * width
    for begin in range(0, K, block):
        end = min(begin + block, K)
        for i in range(begin, end, width):
            j = min(i + width, end)
            score = (left[i:j] / diagonal[i:j, None]).square()
            mask = _mask(score, first[i:j], pattern)
            here = slice(i, j)
            _settle_(left[here], codes[here], errors[here], U[here, here], step[here], mask, top)
            left[j:end].addmm_(U[i:j, j:end].T, errors[i:j], alpha=-1)
        left[end:].addmm_(U[begin:end, end:].T, errors[begin:end], alpha=-1)
    codes = codes.T.contiguous()
    if scale is None:
        return codes
    return Quantized(codes=codes.to(torch.int8), scale=scale.to(torch.bfloat16), group=group)


def _settle_(
    left: Tensor,
    codes: Tensor,
    errors: Tensor,
    U: Tensor,
    step: Tensor,
    mask: Tensor,
    top: int | None,
) -> None:
    """Columns that share a mask, one after the other; writes `left`, `codes` and `errors`."""
    inverse = torch.where(step > 0, 1 / step, 0.0)
    for k in range(len(left)):
        code = torch.mul(left[k], inverse[k], out=codes[k])
        if top is not None:
            code.round_().clamp_(-top, top)
        code.mul_(mask[k])
        error = torch.addcmul(left[k], code, step[k], value=-1, out=errors[k])
        left[k + 1 :].addr_(U[k, k + 1 :], error, alpha=-1)


def _mask(score: Tensor, first: Tensor, pattern: Pattern | None) -> Tensor:
    """Which of a few columns [columns, N] stay: as many as in `first`, of each row or in all."""
    if not isinstance(pattern, Unstructured):
        return keep(score.T, pattern).T.contiguous()
    lists = score.T if pattern.scope == "row" else score.reshape(1, -1)
    count = (first.T if pattern.scope == "row" else first.reshape(1, -1)).sum(1, keepdim=True)
    order = lists.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(lists.shape[1], device=score.device) < count
    mask = torch.zeros_like(chosen.expand_as(order)).scatter_(1, order, chosen)
    return mask.T.contiguous() if pattern.scope == "row" else mask.view_as(score)
