"""From a score per weight to a mask of what stays: exactly n of every m, or an exact share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NofM:
    """n of every m weights along the inputs stay; K must be a multiple of m."""

    n: int
    m: int

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return self.n / self.m

    def kept(self, N: int, K: int) -> int:
        """How many weights of a layer [N, K] stay."""
        return N * K // self.m * self.n


@dataclass(frozen=True)
class Unstructured:
    """A share of the weights goes, wherever they are: of each row, or of the whole layer."""

    sparsity: float
    scope: str = "row"

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return 1 - self.sparsity

    def kept(self, N: int, K: int) -> int:
        """How many weights of a layer [N, K] stay: the share, exact to one weight of its scope."""
        if self.scope == "row":
            return N * (K - round(self.sparsity * K))
        return N * K - round(self.sparsity * N * K)


Pattern = NofM | Unstructured

_FEW = 16
"""Weights of a group up to which comparing each with each beats sorting."""


def keep(score: Tensor, pattern: Pattern | None) -> Tensor:
    """Boolean mask [N, K] of the weights with the largest scores; ties go to the lower index.

    No pattern keeps all.
    """
    if pattern is None:
        return torch.ones_like(score, dtype=torch.bool)
    if isinstance(pattern, NofM):
        largest = _largest_of_few if pattern.m <= _FEW else _largest
        return largest(score.unflatten(1, (-1, pattern.m)), pattern.n).flatten(1)
    N, K = score.shape
    if pattern.scope == "row":
        return _largest(score, pattern.kept(1, K))
    return _largest(score.flatten(), pattern.kept(N, K)).view(N, K)


def _largest(score: Tensor, count: int) -> Tensor:
    order = score.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    return mask.scatter_(-1, order[..., :count], True)


def _largest_of_few(score: Tensor, count: int) -> Tensor:
    """As `_largest`, each compared with each, which is several times faster than sorting."""
    columns = score.unbind(-1)
    ahead = [torch.zeros_like(column, dtype=torch.int8) for column in columns]
    for j in range(len(columns)):
        for i in range(j):
            first = columns[i] >= columns[j]
            ahead[j] += first
            ahead[i] += ~first
    return torch.stack([number < count for number in ahead], dim=-1)
