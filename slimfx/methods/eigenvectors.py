"""The leading eigenvectors of a symmetric positive semidefinite G given as a product of matrices.

Exact: the lower triangle of G is formed and solved whole, G = U diag(s) U^T.

Fast: block Lanczos from a random block X (Golub & Underwood 1977; Musco & Musco 2015, algorithm 2).
With Q an orthonormal basis of [X, G X, G^2 X, ..., G^(q-1) X],

    T = Q^T G Q = Y diag(s) Y^T,    U = Q Y[:, :r]

The error of a compressed weight has a flat spectrum, on which a subspace of one fixed width turns
slowly: block Lanczos, which keeps every direction it has seen, needs fewer products than a
Chebyshev filter (Zhou et al. 2006) or subspace iteration. G itself is never formed: that alone is
worth n columns. `slimfx bench solver` measures both modes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_PANEL = 512
"""Rows of G formed together by the exact solver."""
_TOLERANCE = 0.004
"""Predicted loss of captured energy, in shares of the energy left, below which Lanczos stops."""
_FIRST, _STRIDE = 2.9, 0.47
"""Columns of the basis at the first look at convergence and between two, in shares of the rank."""
_NARROW_FLOOR = 0.003
"""Share of the energy left below which bfloat16 products say nothing about it any more."""
_TRACE_SAMPLES = 16


def leading_eigenvectors(factors: Sequence[Tensor], rank: int, *, fast: bool = False) -> Tensor:
    """U [n, rank], orthonormal columns, largest eigenvalue first.

    `fast` loses at most about 0.5% of the energy that the exact U leaves, trace(G) - trace(U^T G
    U), and pays from n = 512 and for rank <= n / 8; otherwise, and where half the space is not
    enough to converge, the exact solver runs. It multiplies in bfloat16 where the device has
    instructions for it and the spectrum is not too steep, and always draws the same numbers.

    Args:
        factors: G [n, n] is their product from left to right, as in (E, E.T) or (E, H, E.T); all
            float32 or all float64, of a magnitude whose products stay in range.
    """
    n = factors[0].shape[0]
    if fast and n >= 512 and 0 < rank <= n // 8:
        U, steep = None, True
        if factors[0].dtype == torch.float32 and _has_bfloat16(factors[0].device):
            narrow = [factor.bfloat16() for factor in factors]
            U, steep = _block_lanczos(narrow, rank, floor=_NARROW_FLOOR)
        if steep:
            U, _ = _block_lanczos(factors, rank, floor=0.0)
        if U is not None:
            return U
    return _exact(factors, rank)


def _exact(factors: Sequence[Tensor], rank: int) -> Tensor:
    G = factors[0]
    if len(factors) > 1:
        left, right = functools.reduce(torch.matmul, factors[:-1]), factors[-1]
        n = left.shape[0]
        G = left.new_zeros(n, n)
        for i in range(0, n, _PANEL):  # eigh reads the lower triangle only: half the products
            j = min(i + _PANEL, n)
            G[i:j, :j] = left[i:j] @ right[:, :j]
    return torch.linalg.eigh(G).eigenvectors.flip(1)[:, :rank].contiguous()


def _block_lanczos(
    factors: Sequence[Tensor], rank: int, *, floor: float
) -> tuple[Tensor | None, bool]:
    """U [n, rank], or None, and whether that is because less than `floor` of trace(G) is left.

    The other reason is that half the space was not enough.

    Each block is multiplied once and then orthogonal to all before it, so the columns of T are
    true projections whatever the next block is made of.
    """
    n = factors[0].shape[0]
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    b = min(128, max(8, rank // 51 * 8))  # narrow blocks for a high degree, wide ones for speed
    stride = b * max(1, round(_STRIDE * rank / b))
    first = max(b * math.ceil(_FIRST * rank / b), 4 * stride)
    limit = n // 2
    draw = torch.Generator().manual_seed(0)
    Q = factors[0].new_empty(n, limit + b, dtype=wide)
    T = factors[0].new_zeros(limit, limit, dtype=wide)
    Q[:, :b] = torch.linalg.qr(_normal(n, b, draw, Q)).Q
    trace = None
    for k in range(b, limit + 1, b):
        basis = Q[:, :k]
        W = _product(factors, Q[:, k - b : k])
        T[:k, k - b : k], V = _split(W, basis, 2 * b)
        if k >= first and (k - first) % stride == 0:
            if trace is None:
                trace = T.trace().item() + _trace_outside(factors, basis, draw)
            missing, left, Y = _outlook(T[:k, :k], rank, stride, trace)
            if left < floor * trace:
                return None, True
            if missing <= _TOLERANCE * left:
                return basis @ Y, False
        Q[:, k : k + b] = _orthonormal(V, basis, W.norm(dim=0).max(), draw)
    return None, False


def _product(factors: Sequence[Tensor], X: Tensor) -> Tensor:
    """G X in the factors' precision, returned in that of X."""
    dtype = X.dtype
    X = X.to(factors[0].dtype)
    for factor in reversed(factors):
        X = factor @ X
    return X.to(dtype)


def _split(W: Tensor, Q: Tensor, near: int) -> tuple[Tensor, Tensor]:
    """H, V with W = Q H + V and Q^T V = 0.

    In exact arithmetic H is zero but for its last `near` rows (two blocks); taking these first
    leaves a small remainder, of which one pass over the whole basis is enough.
    """
    last = Q[:, -near:]
    N = last.T @ W
    V = W - last @ N
    H = Q.T @ V
    V -= Q @ H
    H[-near:] += N
    return H, V


def _orthonormal(V: Tensor, Q: Tensor, reach: Tensor, draw: torch.Generator) -> Tensor:
    """An orthonormal basis [n, b], orthogonal to Q, of the columns of V and, if too few, of others.

    V is what `_split` left of columns of length `reach` at most. Where V is well above the rounding
    of these, CholeskyQR twice will do (Yamamoto et al. 2015). Elsewhere G has nothing new in some
    directions; a little noise fills them, and V is made orthogonal to Q anew.
    """
    X = torch.where(reach > 0, V / reach, 0.0)
    R, failed = torch.linalg.cholesky_ex(X.T @ X, upper=True)
    if not failed and R.diagonal().min() >= 0.03:
        X = torch.linalg.solve_triangular(R, X, upper=True, left=False)
        R = torch.linalg.cholesky(X.T @ X, upper=True)
        return torch.linalg.solve_triangular(R, X, upper=True, left=False)
    peak = V.abs().max()
    X = torch.where(peak > 0, V / peak, 0.0)
    X = X + 16 * torch.finfo(X.dtype).eps * _normal(X.shape[0], X.shape[1], draw, X)
    for _ in range(3):
        X = torch.linalg.qr(X - Q @ (Q.T @ X)).Q
    return X


def _outlook(T: Tensor, rank: int, stride: int, trace: float) -> tuple[float, float, Tensor]:
    """What more columns could still capture, what is left of `trace`, and Y [k, rank] of now.

    The energy captured with k - 2 stride, k - stride and k columns grows by ever smaller steps; the
    ratio of the last two, taken to stay, gives what all later steps could add.
    """
    k = T.shape[0]
    s, Y = torch.linalg.eigh(T, UPLO="U")
    Y = Y[:, -rank:].flip(1)
    before, middle = (_captured(T[:j, :j], rank) for j in (k - 2 * stride, k - stride))
    now = s[-rank:].double().sum().item()
    step, left = now - middle, max(trace - now, 0.0)
    if step <= 8 * torch.finfo(T.dtype).eps * trace:
        return 0.0, left, Y
    ratio = min(step / max(middle - before, step), 0.9)
    return step * ratio / (1 - ratio), left, Y


def _captured(T: Tensor, rank: int) -> float:
    return torch.linalg.eigvalsh(T, UPLO="U")[-rank:].double().sum().item()


def _trace_outside(factors: Sequence[Tensor], Q: Tensor, draw: torch.Generator) -> float:
    """An estimate of trace(G) - trace(Q^T G Q) (Meyer et al. 2021, Hutch++)."""
    Z = _normal(Q.shape[0], _TRACE_SAMPLES, draw, Q)
    Z -= Q @ (Q.T @ Z)
    return (Z * _product(factors, Z)).double().sum().item() / _TRACE_SAMPLES


def _normal(n: int, columns: int, draw: torch.Generator, like: Tensor) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(n, columns, generator=draw).to(like)


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # torch < 2.12
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
