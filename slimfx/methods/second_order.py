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
from slimfx.methods.masks import keep_largest
from slimfx.methods.quantized import Quantized, largest_code, spread

_BLOCK = 128  # columns updated together before the rest of the row is


def second_order(
    W: Tensor, H: Tensor, scale: Tensor, *, group: int, bits: int, n: int, m: int
) -> Quantized:
    """Codes for W [N, K] that keep ||(W - Q) X|| small; exactly n of every m stay (n = m: all).

    Args:
        H: damped covariance of the inputs [K, K].
        scale: as in `Quantized`.

    The mask of each m columns is chosen when their turn comes, by w^2 / U_jj^2.
    """
    N, K = W.shape
    W = W.float().clone()
    U = inverse_factor(H)
    step = spread(scale.float(), group, K).expand(N, K)
    top = largest_code(bits)
    codes = torch.zeros(N, K, dtype=torch.int8, device=W.device)
    width = _BLOCK - _BLOCK % m if m <= _BLOCK else m
    for start in range(0, K, width):
        stop = min(start + width, K)
        part, within = W[:, start:stop], U[start:stop, start:stop]
        errors = torch.zeros_like(part)
        keep = torch.ones_like(part, dtype=torch.bool)
        for i in range(stop - start):
            if n < m and i % m == 0:
                score = part[:, i : i + m].square() / within.diagonal()[i : i + m].square()
                keep[:, i : i + m] = keep_largest(score, n=n, m=m)
            s = step[:, start + i]
            code = torch.where(s > 0, part[:, i] / s, 0.0).round().clamp(-top, top) * keep[:, i]
            codes[:, start + i] = code.to(torch.int8)
            errors[:, i] = (part[:, i] - code * s) / within[i, i]
            part[:, i:] -= errors[:, i, None] * within[i, i:]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Quantized(codes=codes, scale=scale.to(torch.bfloat16), group=group)
