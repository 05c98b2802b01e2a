"""The leading eigenvectors of G = E E^T or E H E^T, which is never formed where that is dearer.

Small or for many vectors: the lower triangle of G is formed and solved whole, G = U diag(s) U^T.

Else: block Lanczos from a random block X (Golub & Underwood 1977; Musco & Musco 2015, algorithm 2).
With Q an orthonormal basis of [X, G X, G^2 X, ..., G^(q-1) X],

    T = Q^T G Q = Y diag(s) Y^T,    U = Q Y[:, :r]

The error of a compressed weight has a flat spectrum, on which a subspace of one fixed width turns
slowly: block Lanczos, which keeps every direction it has seen, needs fewer products than a
Chebyshev filter (Zhou et al. 2006) or subspace iteration. `slimfx bench solver` measures both
tolerances.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_PANEL = 512
"""Rows of G formed together by the whole solver."""
_TOLERANCE, _FAST_TOLERANCE = 1e-4, 0.005
"""Predicted loss of captured energy, in shares of the energy left, below which Lanczos stops."""
_LATER_BLOCKS = 6.0
"""What all blocks to come add, in shares of the next one: 3 to 6 on compressed weights."""
_FIRST, _STRIDE = 2.7, 0.3
"""Columns of the basis at the first look at convergence and between two, in shares of the rank."""
_NARROW_FLOOR = 0.003
"""Share of the energy left below which bfloat16 products say nothing about it any more."""
_TRACE_SAMPLES = 16


def leading_eigenvectors(
    E: Tensor, rank: int, *, H: Tensor | None = None, fast: bool = False
) -> Tensor:
    """U [n, rank], orthonormal columns, largest eigenvalue first.

    The energy left, trace(G) - trace(U^T G U), is the least possible to 5e-5 of itself, with `fast`
    to 0.5% (0.7% where energies fall in a straight line to zero, the worst case found). Lanczos
    pays from n = 512 and for rank <= n / 8; elsewhere, for float64 and where half the space is not
    enough to converge, G is solved whole. `fast` multiplies in bfloat16 where the device has
    instructions for it and the spectrum is not too steep. The random numbers are always the same.

    Args:
        E: [n, K], float32 or float64, of a magnitude whose products stay in range.
        H: [K, K], symmetric positive semidefinite; None is the identity.
    """
    n = E.shape[0]
    if E.dtype != torch.float32 or n < 512 or not 0 < rank <= n // 8:
        return _whole(_factors(E, H), rank)
    U = None
    dtype = product_dtype(E, fast=fast)
    if dtype != E.dtype:
        narrow = _factors(E.to(dtype), None if H is None else H.to(dtype))
        U = _block_lanczos(narrow, rank, tolerance=_FAST_TOLERANCE, floor=_NARROW_FLOOR)
    if U is None:
        tolerance = _FAST_TOLERANCE if fast else _TOLERANCE
        U = _block_lanczos(_factors(E, H), rank, tolerance=tolerance, floor=0.0)
    return _whole(_factors(E, H), rank) if U is None else U


def product_dtype(like: Tensor, *, fast: bool) -> torch.dtype:
    """bfloat16 for fast products of float32 matrices where that is faster, else what `like` is."""
    narrow = fast and like.dtype == torch.float32 and _has_bfloat16(like.device)
    return torch.bfloat16 if narrow else like.dtype


def _factors(E: Tensor, H: Tensor | None) -> tuple[Tensor, ...]:
    return (E, E.T) if H is None else (E, H, E.T)


def _whole(factors: Sequence[Tensor], rank: int) -> Tensor:
    left, right = functools.reduce(torch.matmul, factors[:-1]), factors[-1]
    n = left.shape[0]
    G = left.new_zeros(n, n)
    for i in range(0, n, _PANEL):  # eigh reads the lower triangle only: half the products
        j = min(i + _PANEL, n)
        G[i:j, :j] = left[i:j] @ right[:, :j]
    return torch.linalg.eigh(G).eigenvectors.flip(1)[:, :rank].contiguous()


def _block_lanczos(
    factors: Sequence[Tensor], rank: int, *, tolerance: float, floor: float
) -> Tensor | None:
    """U [n, rank]; None where half the space is not enough or less than `floor` of G is left.

    Each block is multiplied once and then orthogonal to all before it, so the columns of T are
    true projections whatever the next block is made of.
    """
    n = factors[0].shape[0]
    wide = torch.promote_types(factors[0].dtype, torch.float32)
    b = min(128, max(8, rank // 51 * 8))  # narrow blocks for a high degree, wide ones for speed
    first, stride = (b * math.ceil(share * rank / b) for share in (_FIRST, _STRIDE))
    limit = n // 2
    draw = torch.Generator().manual_seed(0)
    # by columns, so that memory of those that are not reached is never touched
    Q = factors[0].new_empty(limit + b, n, dtype=wide).T
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
            s, Y = (part[..., -rank:] for part in torch.linalg.eigh(T[:k, :k], UPLO="U"))
            left = max(trace - s.double().sum().item(), 0.0)
            if left < floor * trace:
                return None
            missing = _LATER_BLOCKS * _next_block(s, Y[-b:], V, T[k - b : k, k - b : k])
            if missing <= tolerance * left + 8 * torch.finfo(wide).eps * trace:
                return basis @ Y.flip(1)
        Q[:, k : k + b] = _orthonormal(V, basis, W.norm(dim=0).max(), draw)
    return None


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


def _next_block(s: Tensor, y: Tensor, V: Tensor, last: Tensor) -> float:
    """What one more block would add to the energy captured, to second order in its coupling.

    The Ritz vector of s_i leaves the residual V y_i, with y_i its last b coordinates; the next
    block, whose own energies are about those of the `last` one, raises s_i by |V y_i|^2 over the
    distance between the two.
    """
    residual = ((V.T @ V) @ y).mul_(y).sum(0)
    gap = s - last.trace() / last.shape[0]
    return (residual / gap.clamp_min(torch.finfo(s.dtype).eps * s[-1].abs() + 1e-38)).sum().item()


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
