"""What each layer may become: bytes to the byte, and the loss each form of it is predicted to cost.

For each layer and layout the weight is solved once without an adapter. The eigenvectors of E H E^T,
with E what is left of the weight and H the covariance of its inputs, say what an adapter of rank r
leaves of that in the outputs, each weighed by how much it matters (`sensitivity`):

    loss(layout, r) ~ f sum_(i > r) lambda_i sum_n s_n U_ni^2

f is what the joint solver gains beyond the adapter of a fixed weight. It varies little from layer
to layer and from rank to rank, and is measured for one layer of each shape in the middle block.
Statistics come from the dense model, one block at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx import calibrate, data, remember
from slimfx.calibrate import Walk
from slimfx.errors import BudgetError
from slimfx.journal import digest
from slimfx.methods.full_lora import left_by_rank
from slimfx.methods.stats import Stats
from slimfx.passes.cut_blocks import Block, cut_blocks
from slimfx.passes.find_linears import Site, find_linears
from slimfx.passes.observe_inputs import observe_inputs
from slimfx.plan import problems_of, row_of
from slimfx.ranks import ALONE, Ranks
from slimfx.recipe import Recipe
from slimfx.runtime.unread import read
from slimfx.sensitivity import sensitivities
from slimfx.solve import solve
from slimfx.steps import LayerRecipe, Prune, Quantize

LAYOUTS: dict[str, tuple[Prune | None, int]] = {
    "int2": (None, 2),
    "bitmask int3": (Prune("sparsegpt", sparsity=0.5), 3),
    "2:4 int4": (Prune("sparsegpt"), 4),
    "bitmask int4": (Prune("sparsegpt", sparsity=0.5), 4),
    "int3": (None, 3),
    "int4": (None, 4),
    "int8": (None, 8),
}
"""What a weight may be stored as, beside as it is: what is pruned, and the bits of a code."""

_EXACT = ("int8",)
"""Layouts that leave an adapter nothing to do."""
_SENSITIVE_SAMPLES = 8
_RANKS, _LARGEST = 64, 0.25
"""Ranks are steps of one part in `_RANKS` of the smaller side, up to `_LARGEST` of it."""
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Candidate:
    """What a layer may become: None is as it is."""

    how: LayerRecipe | None
    bytes: int
    loss: float
    """Predicted rise of the mean loss in nats (of a program without text, of its squared error)."""


Candidates = Mapping[str, Sequence[Candidate]]
"""By layer."""


def candidates(
    program: ExportedProgram,
    calibration: Any = None,
    *,
    recipe: Recipe,
    layouts: Iterable[str] = tuple(LAYOUTS),
    remembered: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Candidates:
    """What each layer may become, its bytes exact, its loss predicted.

    Args:
        remembered: keep what is computed, block by block, in the user's cache folder (`remember`),
            and take it from there for the same program, weights, recipe, layouts and data.
        ranks: the processes that call this with the same arguments and share the work.

    Raises:
        BudgetError: the recipe or a layout is not one that can be searched.
    """
    layouts, tell = list(layouts), progress or (lambda share, what: None)
    if unknown := [name for name in layouts if name not in LAYOUTS]:
        raise BudgetError(f"layout {unknown[0]!r} is not one of {', '.join(LAYOUTS)}")
    sites = linears_of(program, recipe)
    batches = data.batches(program, calibration, recipe.calibration)
    key = ranks.once(lambda: _key(program, batches, recipe, layouts)) if remembered else None
    job = _Job(program, batches, recipe, layouts, sites, ranks, key)
    losses = job.kept("all", lambda: _losses(job, tell))
    job.forget_blocks()
    found = {site.name: _candidates(site, recipe, losses[site.name]) for site in sites}
    return {name: _nameable(name, each, found) for name, each in found.items()}


def _key(
    program: ExportedProgram, batches: Sequence[Any], recipe: Recipe, layouts: list[str]
) -> dict[str, Any]:
    """All that decides what a search comes to."""
    return {
        "program": hashlib.sha256(str(program.graph).encode()).hexdigest(),
        "weights": digest(program.state_dict),
        "recipe": recipe.to_dict(),
        "layouts": layouts,
        "data": data.digest(program, batches),
    }


@dataclass(frozen=True)
class _Job:
    """What is to be searched, and by whom."""

    program: ExportedProgram
    batches: Sequence[Any]
    recipe: Recipe
    layouts: list[str]
    sites: list[Site]
    ranks: Ranks
    key: dict[str, Any] | None
    """All that decides what it comes to, where that is remembered."""

    def kept(self, part: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` comes to, or came to in an earlier search, which may not have ended."""
        if self.key is None:
            return work()
        key = {**self.key, "part": part}
        found = self.ranks.once(lambda: remember.recall("search", key))
        if found is None:
            found = work()
            self.ranks.once(lambda: remember.keep("search", key, found))
        return found  # type: ignore[no-any-return]

    def forget_blocks(self) -> None:
        """Remove what is kept of blocks, each by the name of its first layer."""
        if self.key is not None and self.ranks.own == 0:
            for site in self.sites:
                remember.forget("search", {**self.key, "part": site.name})


def _losses(job: _Job, tell: Progress) -> dict[str, dict[str, list[float]]]:
    """The predicted loss of each layer in each layout that it can have, at each of `_ranks`."""
    blocks = cut_blocks(job.program, job.sites)
    holders = [i for i, block in enumerate(blocks) if block.sites]
    last, middle = holders[-1], holders[len(holders) // 2]
    losses: dict[str, dict[str, list[float]]] = {}
    gains: dict[str, float] = {}
    with torch.random.fork_rng():
        tell(0.0, "sensitivity")
        calibration = job.recipe.calibration
        few = job.batches[: max(1, _SENSITIVE_SAMPLES // calibration.batch)]
        matters = sensitivities(job.program, blocks, few, seed=calibration.seed, ranks=job.ranks)
        walk = calibrate.start(job.program, job.batches, job.ranks)
        for number, block in enumerate(blocks[: last + 1]):
            tell(0.1 + 0.9 * len(losses) / len(job.sites), block.name or "model")
            if block.sites:
                look = partial(_look, job, walk, block, matters, gains=number == middle)
                found = job.kept(block.sites[0].name, look)
                losses, gains = losses | found["losses"], gains | found["gains"]
            if number < last:
                walk = replace(walk, batches=dict(calibrate.advance(walk, block, {})))
    return {
        name: {
            layout: [loss * (gains[layout] if i else 1.0) for i, loss in enumerate(each)]
            for layout, each in by_layout.items()
        }
        for name, by_layout in losses.items()
    }


def _look(
    job: _Job, walk: Walk, block: Block, matters: Mapping[str, Tensor], *, gains: bool
) -> dict[str, Any]:
    """What adapters of fixed weights leave in a block and, if asked, what joint solving gains."""
    layers = _layers(walk, block, job.recipe, matters)
    curves = _curves(layers, job.layouts, job.ranks)
    shapes = list({layer.W.shape: layer for layer in layers}.values())
    losses = {
        layer.site.name: {
            layout: [curve[rank].item() for rank in _ranks(layer.site, job.recipe, layout)]
            for layout, curve in curves[layer.site.name].items()
        }
        for layer in layers
    }
    found = _gains(shapes, job.layouts, curves, job.ranks) if gains else {}
    return {"losses": losses, "gains": found}


def linears_of(program: ExportedProgram, recipe: Recipe) -> list[Site]:
    """The linears that the recipe does not skip.

    Raises:
        BudgetError: there is none, one cannot be compressed, or its solver's error is not what the
            search predicts.
    """
    found = []
    for site in find_linears(program):
        how = recipe.for_layer(site.name)
        if how is None or site.routes:
            continue
        full = how.adapter is None or how.adapter.full
        if how.solve.method != "joint" or how.scales_inputs or not full:
            raise BudgetError(
                f"{site.name}: a budget is searched for solve.method joint without a transform, "
                f"not {how.solve.method}; start from the preset joint or joint-q"
            )
        for problem in problems_of(site, _how(how, "int8", 0)):  # such as tied weights
            raise BudgetError(f"{site.name}: {problem}")
        found.append(site)
    if not found:
        raise BudgetError("the recipe skips every linear; take some of them out of skip")
    return found


@dataclass(frozen=True)
class _Layer:
    """A linear of the block that is being looked at."""

    site: Site
    how: LayerRecipe
    W: Tensor
    stats: Stats
    matters: Tensor
    """How much each output matters [N]."""
    has_bias: bool

    def left(self, how: LayerRecipe) -> Tensor:
        """The error E [N, K] of the weight as `how` solves it."""
        solution = solve(self.site.name, self.W, self.stats, how, has_bias=self.has_bias)
        return self.W - solution.dense()

    @property
    def covariance(self) -> Tensor:
        """Of the inputs [K, K], about their mean where the bias takes that up."""
        centred = self.has_bias and self.how.solve.correct_bias
        return (self.stats.centred() if centred else self.stats).covariance


def _layers(
    walk: Walk, block: Block, recipe: Recipe, matters: Mapping[str, Tensor]
) -> list[_Layer]:
    program = walk.program
    watched = observe_inputs(program, block.sites, set(block.nodes))
    names = frozenset(site.name for site in block.sites)
    stats = calibrate.observe(walk, block, watched, names) if watched else {}
    found = []
    for site in block.sites:
        stored, how = read(program.state_dict[site.fqn]).detach(), recipe.for_layer(site.name)
        assert how is not None
        W = (stored.T if site.transposed else stored).float()
        weights = matters.get(site.name, W.new_zeros(len(W)))  # no output depends on it
        found.append(_Layer(site, how, W, stats[site.name], weights, site.bias is not None))
    return found


def _curves(
    layers: list[_Layer], layouts: Iterable[str], ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """For each layer and possible layout, the loss that the best adapter leaves, by rank."""
    pairs = [
        (layer, layout)
        for layer in layers
        for layout in layouts
        if not any(problems_of(layer.site, _how(layer.how, layout, 0)))
    ]
    found: dict[str, dict[str, Tensor]] = {layer.site.name: {} for layer in layers}
    for (layer, layout), curve in zip(pairs, ranks.each(pairs, _curve), strict=True):
        found[layer.site.name][layout] = curve
    return found


def _curve(pair: tuple[_Layer, str]) -> Tensor:
    layer, layout = pair
    return left_by_rank(layer.left(_how(layer.how, layout, 0)), layer.covariance, layer.matters)


def _gains(
    layers: list[_Layer],
    layouts: Iterable[str],
    curves: dict[str, dict[str, Tensor]],
    ranks: Ranks,
) -> dict[str, float]:
    """For each layout, the loss of the joint solver in shares of what an adapter of its rank leaves
    by itself; the mean of those layers.
    """
    pairs = [
        (layer, layout, rank, curve[rank].item())
        for layout in layouts
        for layer in layers
        if layout not in _EXACT
        and layer.how.adapter is not None
        and (curve := curves[layer.site.name].get(layout)) is not None
        and curve[rank := layer.how.adapter.rank_for(*layer.W.shape)] > 0
    ]
    shares: dict[str, list[float]] = {layout: [] for layout in layouts}
    for (_, layout, _, alone), loss in zip(pairs, ranks.each(pairs, _joint_loss), strict=True):
        shares[layout].append(loss / alone)
    return {layout: sum(each) / len(each) if each else 1.0 for layout, each in shares.items()}


def _joint_loss(pair: tuple[_Layer, str, int, float]) -> float:
    layer, layout, rank, _ = pair
    E, H = layer.left(_how(layer.how, layout, rank)), layer.covariance
    return (layer.matters @ ((E @ H) * E)).sum().item()


def _how(base: LayerRecipe, layout: str, rank: int) -> LayerRecipe:
    """A layer's recipe with another layout and rank."""
    prune, bits = LAYOUTS[layout]
    return dataclasses.replace(
        base,
        prune=prune,
        quantize=dataclasses.replace(base.quantize or Quantize(), bits=bits),
        adapter=dataclasses.replace(base.adapter, rank=rank) if base.adapter and rank else None,
    )


def _ranks(site: Site, recipe: Recipe, layout: str) -> Sequence[int]:
    """The ranks that a layer may have in a layout."""
    base, smaller = recipe.for_layer(site.name), min(site.out_features, site.in_features)
    if base is None or base.adapter is None or layout in _EXACT:
        return [0]
    return range(0, int(_LARGEST * smaller) + 1, max(1, smaller // _RANKS))


def _candidates(
    site: Site, recipe: Recipe, losses: Mapping[str, Sequence[float]]
) -> list[Candidate]:
    base = recipe.for_layer(site.name)
    assert base is not None
    found = [Candidate(None, site.out_features * site.in_features * site.dtype.itemsize, 0.0)]
    for layout, each in losses.items():
        for rank, loss in zip(_ranks(site, recipe, layout), each, strict=True):
            how = _how(base, layout, rank)
            found.append(Candidate(how, row_of(site, how).bytes_after, loss))
    return found


def _nameable(name: str, found: list[Candidate], names: Iterable[str]) -> list[Candidate]:
    """Without what only `skip` says, where that would skip another layer by the end of its name."""
    ambiguous = any(other.endswith(f".{name}") for other in names)
    return found[1:] if ambiguous and len(found) > 1 else found
