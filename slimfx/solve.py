"""One linear by its recipe: transform, prune, quantize, compensate. Tensors in, tensors out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slimfx.errors import SolveError
from slimfx.methods import COMPENSATORS, PRUNERS, QUANTIZERS
from slimfx.methods.absmax import absmax
from slimfx.methods.affinequant import learned_transform
from slimfx.methods.alternate import alternate
from slimfx.methods.awq import awq
from slimfx.methods.bias import mean_error
from slimfx.methods.block_match import learned_adapter
from slimfx.methods.covariance import damped
from slimfx.methods.full_lora import low_rank_under
from slimfx.methods.joint import joint
from slimfx.methods.learnable import Learnable
from slimfx.methods.lplr import lplr, lplr_under
from slimfx.methods.masks import NofM, keep
from slimfx.methods.omniquant import learned_clipping
from slimfx.methods.quantized import Parts, Quantized, as_float, largest_code, quantize, spread
from slimfx.methods.salient_channels import salient_channels
from slimfx.methods.second_order import second_order
from slimfx.methods.smoothquant import smoothquant
from slimfx.methods.spectrum import energy, spectrum
from slimfx.methods.stats import Stats
from slimfx.steps import Adapter, LayerRecipe, Quantize

Stored = Quantized | Tensor


@dataclass(frozen=True)
class Solution:
    """A compressed layer: y = (weight + R L) (x * input_scale) + bias + bias_shift."""

    weight: Stored
    """[N, K], zero where pruned: codes, or bfloat16 where nothing is quantized."""
    L: Stored | None
    R: Stored | None
    input_scale: Tensor | None
    """bfloat16 [K]."""
    bias_shift: Tensor | None
    """float32 [N], the mean error of the output."""
    snr: float
    """Signal to noise of the layer's output in dB, inputs taken as uncorrelated."""
    snr_without_adapter: float
    clipped: float
    """Share of the weights beyond the largest code."""
    notes: tuple[str, ...] = ()
    """What was out of the ordinary, and the rule that was followed."""
    spectrum: tuple[float, ...] = ()
    """Of the adapter, as `methods.spectrum` has it."""

    @property
    def parts(self) -> Parts:
        """The matrices alone, in coordinates in which the input is already scaled."""
        return Parts(self.weight, self.L, self.R)

    def dense(self) -> Tensor:
        """The float32 weight [N, K] that the compressed layer multiplies its own input with."""
        dense = self.parts.dense()
        return dense if self.input_scale is None else dense * self.input_scale.float()


def solve(
    name: str,
    weight: Tensor,
    stats: Stats,
    recipe: LayerRecipe,
    *,
    mask: Tensor | None = None,
    has_bias: bool = False,
) -> Solution:
    """Compress the weight [N, K] of layer `name` for the inputs that `stats` describes.

    Args:
        mask: what stays, where the recipe takes masks from a file.
        has_bias: can the layer take up a mean error of its output?

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
    notes = _notes(W, stats, recipe)
    shifts = recipe.solve.correct_bias and has_bias
    if shifts:
        stats = stats.centred()
    unit = _power_of_two(W.abs().max().item())
    try:
        c = _input_scale(W / unit, stats, recipe, mask)
        if c is not None:
            W, stats = W / c, stats.scaled(c)
        parts = _SOLVERS[recipe.solve.method](W / unit, stats, recipe, mask)
    except torch.linalg.LinAlgError as failure:
        raise SolveError(f"{name}: {failure}; give more calibration data or skip it") from failure
    L = None if parts.L is None else _scaled(parts.L, unit)
    parts = Parts(_scaled(parts.weight, unit), L, parts.R)
    shift = mean_error(W, parts.dense(), stats) if shifts else None
    return _measured(name, W, stats, recipe, parts, c, shift, notes)


def learnable(weight: Tensor, solution: Solution, recipe: LayerRecipe) -> Learnable:
    """What tuning may change of a solution for the weight [N, K], by the recipe's tune step."""
    assert recipe.tune is not None
    c = torch.ones(weight.shape[1]) if solution.input_scale is None else solution.input_scale
    c = c.float().to(weight.device)
    if recipe.tune.method == "match":
        store = partial(_store, how=recipe.adapter)  # type: ignore[arg-type]
        return _behind(learned_adapter(solution.parts, store=store), c, solution.input_scale)
    W, how = weight.detach().float(), recipe.quantize
    assert how is not None and isinstance(solution.weight, Quantized)
    mask = keep((solution.weight.codes != 0).float(), recipe.pattern) if recipe.pattern else None
    grid = partial(_GRIDS[recipe.tune.method], bits=how.bits, granularity=how.granularity)
    if recipe.tune.method == "affine":
        return grid(W, mask, c, group=how.group)
    return _behind(grid(W / c, mask, group=how.group), c, solution.input_scale)


_GRIDS: dict[str, Callable[..., Learnable]] = {
    "clipping": learned_clipping,
    "affine": learned_transform,
}


def _behind(learned: Learnable, c: Tensor, input_scale: Tensor | None) -> Learnable:
    """A learnable of W / c as one of W, for the input before its scale."""
    return Learnable(
        values=learned.values,
        weight=lambda values: learned.weight(values) * c,
        finish=lambda values: (learned.finish(values)[0], input_scale),
    )


def learned_solution(
    name: str,
    weight: Tensor,
    stats: Stats,
    recipe: LayerRecipe,
    before: Solution,
    learned: tuple[Parts, Tensor | None],
) -> Solution:
    """The solution after tuning: its new parts, measured as `solve` measures them.

    Raises:
        SolveError: they are not finite.
    """
    W, (parts, c) = weight.detach().float(), learned
    if c is not None:
        W, stats = W / c.float(), stats.scaled(c.float())
    return _measured(name, W, stats, recipe, parts, c, before.bias_shift, before.notes)


def _measured(
    name: str,
    W: Tensor,
    stats: Stats,
    recipe: LayerRecipe,
    parts: Parts,
    c: Tensor | None,
    shift: Tensor | None,
    notes: tuple[str, ...],
) -> Solution:
    """The solution with its figures, if it is finite."""
    before, left = W - as_float(parts.weight), W - parts.dense()
    if not left.isfinite().all():
        raise SolveError(
            f"{name}: the solution is not finite (largest |weight| {W.abs().max():.3g}, largest "
            f"input {stats.peak.max():.3g}); add the layer to skip"
        )
    how, signal = recipe.quantize, energy(W, stats.rms)
    noise = energy(before, stats.rms)
    return Solution(
        weight=parts.weight,
        L=parts.L,
        R=parts.R,
        input_scale=None if c is None else c.to(torch.bfloat16),
        bias_shift=shift,
        snr=_decibels(signal, energy(left, stats.rms)),
        snr_without_adapter=_decibels(signal, noise),
        clipped=_clipped(W, parts.weight, how.bits) if how else 0.0,
        notes=notes,
        spectrum=()
        if parts.L is None or parts.R is None
        else spectrum(noise, as_float(parts.L), as_float(parts.R), stats.rms),
    )


def _notes(W: Tensor, stats: Stats, recipe: LayerRecipe) -> tuple[str, ...]:
    """The written rules that apply to this layer."""
    found = []
    dead, K = int(stats.dead.sum()), W.shape[1]
    if dead:
        found.append(
            f"{dead} of {K} inputs were zero in every calibration token; their weights count as "
            f"the least important"
        )
    if stats.tokens == 0:
        found.append("no calibration token reached it; all its inputs were taken alike")
    elif recipe.needs_covariance and stats.tokens < K:
        found.append(
            f"{stats.tokens} tokens cannot fill a covariance of {K} inputs; 1% of its mean "
            f"diagonal was added, as always"
        )
    if not W.any():
        found.append("every weight is zero, and so is its compressed form")
    return tuple(found)


def _power_of_two(peak: float) -> float:
    """A factor that brings a weight near one and back without rounding; squares stay in range."""
    return 2.0 ** math.frexp(peak)[1] if peak > 1e-30 else 1.0


def _scaled(part: Stored, unit: float) -> Stored:
    if isinstance(part, Quantized):
        return Quantized(part.codes, part.scale * unit, part.group)
    return part * unit


def _input_scale(
    W: Tensor, stats: Stats, recipe: LayerRecipe, mask: Tensor | None
) -> Tensor | None:
    how = recipe.transform
    if how is None:
        return None
    if how.method == "awq":
        if mask is None:
            mask = _mask(W, stats, recipe)  # as for c = 1, which Wanda's score does not depend on
        return awq(W, stats, quantize=lambda w: as_float(_coded(w, stats, recipe, mask)))
    if how.method == "smoothquant":
        return smoothquant(W, stats, alpha=how.alpha)
    return salient_channels(W, stats, share=how.share, factor=how.factor)


def _mask(W: Tensor, stats: Stats, recipe: LayerRecipe) -> Tensor | None:
    if recipe.prune is None:
        return None
    # SparseGPT chooses as it goes; what it will keep is only guessed here, for AWQ's search.
    method = "wanda" if recipe.prune.method == "sparsegpt" else recipe.prune.method
    return keep(PRUNERS[method](W, stats), recipe.pattern)


def _coded(W: Tensor, stats: Stats, recipe: LayerRecipe, mask: Tensor | None) -> Stored:
    """Pruned and quantized, each step by itself.

    The mask is chosen on the float weight, as the authors' code does, the scale on all of it.
    """
    mask = _mask(W, stats, recipe) if mask is None else mask
    how = recipe.quantize
    if how is None:
        return (W if mask is None else W * mask).to(torch.bfloat16)
    coded = quantize(W, _scale(W, how), group=how.group, bits=how.bits)
    if mask is None:
        return coded
    return Quantized(coded.codes * mask, coded.scale, coded.group)


def _second_order_coded(W: Tensor, stats: Stats, recipe: LayerRecipe) -> Stored:
    how = recipe.quantize
    scale = None if how is None else _scale(_kept(W, stats, recipe), how)
    H = damped(stats.covariance)
    group, bits = (how.group, how.bits) if how else (W.shape[1], 16)
    return _rounded(second_order(W, H, scale, group=group, bits=bits, pattern=recipe.pattern))


def _rounded(weight: Stored) -> Stored:
    """A weight that is not quantized is kept in bfloat16."""
    return weight if isinstance(weight, Quantized) else weight.to(torch.bfloat16)


def _one_shot(W: Tensor, stats: Stats, recipe: LayerRecipe, mask: Tensor | None) -> Parts:
    return _with_adapter(W, _coded(W, stats, recipe, mask), stats, recipe)


def _second_order(W: Tensor, stats: Stats, recipe: LayerRecipe, mask: Tensor | None) -> Parts:
    return _with_adapter(W, _second_order_coded(W, stats, recipe), stats, recipe)


def _with_adapter(W: Tensor, weight: Stored, stats: Stats, recipe: LayerRecipe) -> Parts:
    if recipe.adapter is None:
        return Parts(weight, None, None)
    return Parts(weight, *_adapter(W - as_float(weight), stats, recipe.adapter))


def _alternate(W: Tensor, stats: Stats, recipe: LayerRecipe, mask: Tensor | None) -> Parts:
    if recipe.solve.weight == "second-order":
        compress = partial(_second_order_coded, stats=stats, recipe=recipe)
    else:
        compress = partial(_coded, stats=stats, recipe=recipe, mask=mask)
    H = damped(stats.covariance) if recipe.needs_covariance else None
    adapter = recipe.adapter
    assert adapter is not None  # the recipe checks it

    def error(E: Tensor) -> float:
        return ((E * stats.rms).square() if H is None else (E @ H) * E).sum().item()

    return alternate(
        W,
        compress=compress,
        compensate=lambda E: _adapter(E, stats, adapter),
        error=error,
        rounds=recipe.solve.rounds,
        low_rank_first=recipe.solve.low_rank_first,
    )


def _joint(W: Tensor, stats: Stats, recipe: LayerRecipe, mask: Tensor | None) -> Parts:
    how, adapter = recipe.quantize, recipe.adapter
    parts = joint(
        W,
        damped(stats.covariance),
        rank=adapter.rank_for(*W.shape) if adapter else 0,
        rounds=recipe.solve.rounds,
        scale_of=(lambda T: _scale(_kept(T, stats, recipe), how)) if how else None,
        fit=lambda E, H: _adapter_under(E, H, stats, adapter),  # type: ignore[arg-type]
        group=how.group if how else W.shape[1],
        bits=how.bits if how else 16,
        pattern=recipe.pattern,
    )
    return parts._replace(weight=_rounded(parts.weight))


_SOLVERS = {
    "one-shot": _one_shot,
    "second-order": _second_order,
    "alternate": _alternate,
    "joint": _joint,
}


def _scale(W: Tensor, how: Quantize) -> Tensor:
    return QUANTIZERS[how.method](W, bits=how.bits, granularity=how.granularity, group=how.group)


def _kept(W: Tensor, stats: Stats, recipe: LayerRecipe) -> Tensor:
    """The weights that will likely stay, zeros elsewhere: what the scale has to fit."""
    return W * keep(W.abs() * stats.rms, recipe.pattern)


def _adapter(error: Tensor, stats: Stats, how: Adapter) -> tuple[Stored, Stored]:
    rank = how.rank_for(*error.shape)
    if how.method == "lplr":
        return lplr(error, stats, rank=rank, store=partial(_store, how=how))
    L, R = COMPENSATORS[how.method](error, stats, rank=rank, fast=how.fast)
    return _store(_thinned(L, stats, how), how), _store(R, how)


def _adapter_under(error: Tensor, H: Tensor, stats: Stats, how: Adapter) -> tuple[Stored, Stored]:
    """`_adapter` for the methods that weigh errors with the damped covariance, which is at hand."""
    rank = how.rank_for(*error.shape)
    if how.method == "lplr":
        return lplr_under(error, H, rank, partial(_store, how=how))
    L, R = low_rank_under(error, H, rank, fast=how.fast)
    return _store(_thinned(L, stats, how), how), _store(R, how)


def _thinned(L: Tensor, stats: Stats, how: Adapter) -> Tensor:
    return L * keep(L.abs() * stats.rms, NofM(2, 4)) if how.sparse else L


def _store(matrix: Tensor, how: Adapter) -> Stored:
    if how.bits == 4:
        scale = absmax(matrix, bits=4, granularity="group", group=how.group)
        return quantize(matrix, scale, group=how.group, bits=4)
    return matrix.to(torch.bfloat16 if how.bits == 16 else torch.float32).contiguous()


def _decibels(signal: float, noise: float) -> float:
    """10 log10 of E||W x||^2 / E||error x||^2 for inputs with the measured rms."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else math.inf


def _clipped(W: Tensor, weight: Stored, bits: int) -> float:
    if not isinstance(weight, Quantized):
        return 0.0
    step = spread(weight.scale.float(), weight.group, W.shape[1])
    return (W.abs() > step * (largest_code(bits) + 0.5)).float().mean().item()
