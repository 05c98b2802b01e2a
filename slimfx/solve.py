"""One linear by its recipe: quantize, prune, compensate. Tensors in, tensors out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfx.errors import SolveError
from slimfx.methods import COMPENSATORS, PRUNERS, QUANTIZERS
from slimfx.methods.absmax import absmax
from slimfx.methods.covariance import damped
from slimfx.methods.joint import joint
from slimfx.methods.masks import keep_largest
from slimfx.methods.quantized import Quantized, largest_code, quantize, spread
from slimfx.methods.second_order import second_order
from slimfx.methods.stats import Stats
from slimfx.recipe import Adapter, LayerRecipe, Quantize

Parts = tuple[Quantized, Quantized | Tensor | None, Quantized | Tensor | None]
"""The weight Q, and L and R where there is an adapter."""


@dataclass(frozen=True)
class Solution:
    """A compressed weight [N, K] ~ weight + R @ L, codes zero where pruned."""

    weight: Quantized
    L: Quantized | Tensor | None
    R: Quantized | Tensor | None
    snr: float
    """Signal to noise of the layer's output in dB, inputs taken as uncorrelated."""
    snr_without_adapter: float
    clipped: float
    """Share of the weights beyond the largest code."""

    def dense(self) -> Tensor:
        """The float32 weight [N, K] that the compressed layer multiplies with."""
        if self.L is None or self.R is None:
            return self.weight.dense()
        return self.weight.dense() + as_float(self.R) @ as_float(self.L)


def solve(name: str, weight: Tensor, stats: Stats, recipe: LayerRecipe) -> Solution:
    """Compress the weight [N, K] of layer `name` for the inputs that `stats` describes.

    Raises:
        SolveError: the weight or the result is not finite.
    """
    W = weight.detach().float()
    if not W.isfinite().all():
        bad = int((~W.isfinite()).sum())
        raise SolveError(
            f"{name}: {bad} of {W.numel()} weights are NaN or infinite; mend the checkpoint or "
            f"add the layer to skip"
        )
    unit = _power_of_two(W.abs().max().item())
    try:
        coded, L, R = _SOLVERS[recipe.solve.method](W / unit, stats, recipe)
    except torch.linalg.LinAlgError as failure:
        raise SolveError(f"{name}: {failure}; give more calibration data or skip it") from failure
    coded = _scaled(coded, unit)
    if L is not None:
        L = _scaled(L, unit) if isinstance(L, Quantized) else L * unit
    error = W - coded.dense()
    left = error if L is None or R is None else error - as_float(R) @ as_float(L)
    if not left.isfinite().all():
        raise SolveError(
            f"{name}: the solution is not finite (largest |weight| {W.abs().max():.3g}, largest "
            f"input {stats.peak.max():.3g}); add the layer to skip"
        )
    return Solution(
        weight=coded,
        L=L,
        R=R,
        snr=_decibels(W, left, stats),
        snr_without_adapter=_decibels(W, error, stats),
        clipped=_clipped(W, coded, recipe.quantize.bits),
    )


def as_float(matrix: Quantized | Tensor) -> Tensor:
    """An adapter as float32, whatever it is stored as."""
    return matrix.dense() if isinstance(matrix, Quantized) else matrix.float()


def _power_of_two(peak: float) -> float:
    """A factor that brings a weight near one and back without rounding; squares stay in range."""
    return 2.0 ** math.frexp(peak)[1] if peak > 1e-30 else 1.0


def _scaled(part: Quantized, unit: float) -> Quantized:
    return Quantized(part.codes, part.scale * unit, part.group)


def _one_shot(W: Tensor, stats: Stats, recipe: LayerRecipe) -> Parts:
    """The mask is chosen on the float weight, as the authors' code does, the scale on all of it."""
    how = recipe.quantize
    coded = quantize(W, _scale(W, how), group=how.group, bits=how.bits)
    if recipe.prune is not None:
        prune = recipe.prune
        mask = PRUNERS[prune.method](W, stats, n=prune.n, m=prune.m)
        coded = Quantized(coded.codes * mask, coded.scale, coded.group)
    return coded, *_adapter(W - coded.dense(), stats, recipe.adapter)


def _second_order(W: Tensor, stats: Stats, recipe: LayerRecipe) -> Parts:
    how, (n, m) = recipe.quantize, _pattern(recipe)
    H = damped(stats.covariance)
    scale = _scale(_kept(W, stats, n, m), how)
    coded = second_order(W, H, scale, group=how.group, bits=how.bits, n=n, m=m)
    return coded, *_adapter(W - coded.dense(), stats, recipe.adapter)


def _joint(W: Tensor, stats: Stats, recipe: LayerRecipe) -> Parts:
    how, (n, m) = recipe.quantize, _pattern(recipe)
    return joint(
        W,
        damped(stats.covariance),
        rank=recipe.adapter.rank_for(*W.shape) if recipe.adapter else 0,
        rounds=recipe.solve.rounds,
        scale_of=lambda target: _scale(_kept(target, stats, n, m), how),
        store=lambda matrix: _store(matrix, recipe.adapter),  # type: ignore[arg-type]
        as_float=as_float,  # type: ignore[arg-type]
        group=how.group,
        bits=how.bits,
        n=n,
        m=m,
    )


_SOLVERS = {"one-shot": _one_shot, "second-order": _second_order, "joint": _joint}


def _scale(W: Tensor, how: Quantize) -> Tensor:
    return QUANTIZERS[how.method](W, bits=how.bits, granularity=how.granularity, group=how.group)


def _pattern(recipe: LayerRecipe) -> tuple[int, int]:
    """n:m of a layer; 1:1 where nothing is pruned."""
    return (recipe.prune.n, recipe.prune.m) if recipe.prune else (1, 1)


def _kept(W: Tensor, stats: Stats, n: int, m: int) -> Tensor:
    """The weights that will likely stay, zeros elsewhere: what the scale has to fit."""
    return W * keep_largest(W.abs() * stats.rms, n=n, m=m) if n < m else W


def _adapter(
    error: Tensor, stats: Stats, how: Adapter | None
) -> tuple[Quantized | Tensor | None, Quantized | Tensor | None]:
    if how is None:
        return None, None
    L, R = COMPENSATORS[how.method](error, stats, rank=how.rank_for(*error.shape))
    return _store(L, how), _store(R, how)


def _store(matrix: Tensor, how: Adapter) -> Quantized | Tensor:
    if how.bits == 4:
        scale = absmax(matrix, bits=4, granularity="group", group=how.group)
        return quantize(matrix, scale, group=how.group, bits=4)
    return matrix.to(torch.bfloat16 if how.bits == 16 else torch.float32).contiguous()


def _decibels(W: Tensor, error: Tensor, stats: Stats) -> float:
    """10 log10 of E||W x||^2 / E||error x||^2 for inputs with the measured rms."""
    rms = stats.rms.double()
    noise = (error.double() * rms).square().sum().item()
    signal = (W.double() * rms).square().sum().item()
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf


def _clipped(W: Tensor, coded: Quantized, bits: int) -> float:
    step = spread(coded.scale.float(), coded.group, W.shape[1])
    return (W.abs() > step * (largest_code(bits) + 0.5)).float().mean().item()
