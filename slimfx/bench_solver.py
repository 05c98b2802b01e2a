"""How long the low-rank solvers take on one layer, beside a full SVD, and how much they leave."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfx.methods.low_rank import low_rank
from slimfx.methods.masks import NofM, keep
from slimfx.methods.quantized import quantize
from slimfx.methods.slim_lora import saliency
from slimfx.methods.slim_quant import slim_quant
from slimfx.methods.stats import add_tokens, empty_stats
from slimfx.methods.wanda import wanda

Progress = Callable[[float, str], None]
Factors = tuple[Tensor, Tensor]
_ROUNDS = 3
_TOKENS = 256


@dataclass(frozen=True)
class SolverRow:
    """One solver on one error matrix; every row of a table is from the same run."""

    name: str
    seconds: float
    """Median of three, but the SVD, which is slow, is taken once."""
    spread: float
    """Slowest less fastest of the three, in seconds."""
    speedup: float
    """Seconds of the SVD divided by these."""
    residual: float
    """||E - R L||_F^2 divided by that of the truncated SVD."""


def bench_solver(
    size: int = 4096, rank: int | None = None, seed: int = 0, progress: Progress | None = None
) -> tuple[SolverRow, ...]:
    """torch.linalg.svd, `low_rank` and its fast mode on one error [size, size], in this order.

    Args:
        size: a multiple of 4.
        rank: None takes a tenth of the size.
        progress: called with the share done and the name of the solver that comes next.
    """
    rank = max(1, size // 10) if rank is None else rank
    E = error_matrix(size, seed)
    solvers: tuple[tuple[str, int, Callable[[], Factors]], ...] = (
        ("torch.linalg.svd", 1, lambda: _truncated_svd(E, rank)),
        ("exact", _ROUNDS, lambda: low_rank(E, rank)),
        ("fast", _ROUNDS, lambda: low_rank(E, rank, fast=True)),
    )
    rows: list[SolverRow] = []
    svd = best = 0.0
    for i, (name, rounds, solve) in enumerate(solvers):
        if progress is not None:
            progress(i / len(solvers), name)
        seconds, spread, left = _measured(E, solve, rounds)
        if not rows:
            svd, best = seconds, left
        rows.append(SolverRow(name, seconds, spread, svd / seconds, left / best))
    return tuple(rows)


def error_matrix(size: int, seed: int) -> Tensor:
    """(W - Wc) diag(saliency), float32 [size, size], as SLiM-LoRA hands it to the solver.

    W is normal with a weak low-rank part, and its inputs have log-normal magnitudes; Wc is W after
    Wanda 2:4 and int4 with one SLiM-Quant scale. The spectrum is flat: at size 4096 the singular
    value number size / 10 is 0.6 of the largest, and those before it hold 39% of the energy.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    W = 0.02 * normal(size, size) + 0.01 * normal(size, 64) @ normal(64, size) / 8
    x = normal(_TOKENS, size) * torch.exp(0.5 * normal(size))
    stats = add_tokens(empty_stats(size), x)
    W_24 = W * keep(wanda(W, stats), NofM(2, 4))
    scale = slim_quant(W_24, bits=4, granularity="tensor", group=size)
    Wc = quantize(W_24, scale, group=size, bits=4).dense()
    return (W - Wc) * saliency(stats)


def _truncated_svd(E: Tensor, rank: int) -> Factors:
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    return S[:rank, None] * Vh[:rank], U[:, :rank]


def _measured(E: Tensor, solve: Callable[[], Factors], rounds: int) -> tuple[float, float, float]:
    """Median seconds, slowest less fastest, and ||E - R L||_F^2."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        L, R = solve()
        seconds.append(time.perf_counter() - start)
    left = (E - R @ L).double().square().sum().item()
    return statistics.median(seconds), max(seconds) - min(seconds), left
