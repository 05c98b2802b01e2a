"""One linear: quantize, prune, compensate. Tensors in, tensors out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfx.errors import SolveError
from slimfx.methods import COMPENSATORS, PRUNERS, QUANTIZERS
from slimfx.methods.absmax import absmax
from slimfx.methods.quantized import Quantized, largest_code, quantize, spread
from slimfx.methods.stats import Stats
from slimfx.recipe import Adapter, LayerRecipe


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

    The mask is chosen on the float weight, as the authors' code does; the scale on all of it
    (SLiM-Quant precedes pruning, arXiv 2410.09615, algorithm 1).

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
    how = recipe.quantize
    scale = QUANTIZERS[how.method](W, bits=how.bits, granularity=how.granularity, group=how.group)
    coded = quantize(W, scale, group=how.group, bits=how.bits)
    if recipe.prune is not None:
        prune = recipe.prune
        mask = PRUNERS[prune.method](W, stats, n=prune.n, m=prune.m)
        coded = Quantized(coded.codes * mask, coded.scale, coded.group)
    error = W - coded.dense()
    L, R = _adapter(error, stats, recipe.adapter) if recipe.adapter else (None, None)
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
        clipped=_clipped(W, coded, how.bits),
    )


def as_float(matrix: Quantized | Tensor) -> Tensor:
    """An adapter as float32, whatever it is stored as."""
    return matrix.dense() if isinstance(matrix, Quantized) else matrix.float()


def _adapter(
    error: Tensor, stats: Stats, how: Adapter
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
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
