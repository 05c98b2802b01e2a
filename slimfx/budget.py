"""Make it fit: from a size or a loss to a recipe, by what each layer costs and how much it matters.

For each layer and layout the weight is solved once without an adapter. The eigenvectors of E H E^T,
with E what is left of the weight and H the covariance of its inputs, say what an adapter of rank r
leaves of that in the outputs, each weighed by how much it matters (`sensitivity`):

    loss(layout, r) ~ f sum_(i > r) lambda_i sum_n s_n U_ni^2

f is what the joint solver gains beyond the adapter of a fixed weight. It varies little from layer
to layer and from rank to rank, and is measured in the middle block. `allocate` then chooses.
Statistics come from the dense model, one block at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx import calibrate, data
from slimfx.calibrate import Walk
from slimfx.compress import compress
from slimfx.errors import BudgetError
from slimfx.evaluate import evaluate
from slimfx.methods.allocate import Option, allocate
from slimfx.methods.full_lora import left_by_rank
from slimfx.methods.stats import Stats
from slimfx.passes.cut_blocks import Block, cut_blocks
from slimfx.passes.find_linears import Site, find_linears
from slimfx.passes.observe_inputs import observe_inputs
from slimfx.plan import plan, problems_of, row_of
from slimfx.recipe import Recipe
from slimfx.sensitivity import is_language_model, sensitivities
from slimfx.solve import solve
from slimfx.steps import LayerRecipe, Override, Prune, Quantize

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

_SENSITIVE_SAMPLES = 8
_RANKS, _LARGEST = 64, 0.25
"""Ranks are steps of one part in `_RANKS` of the smaller side, up to `_LARGEST` of it."""
_TRIES, _CLOSE = 4, 0.9
"""Compressions at most until a loss holds, and the share of it that is near enough."""
_WINDOWS = 48
"""Of held-out text."""

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Target:
    """What to reach; one of the three."""

    bits: float | None = None
    """Stored bits for each weight of the linears, scales and adapters included, at most."""
    size: float | None = None
    """Bytes of the file at most."""
    loss: float | None = None
    """Relative increase of perplexity on held-out text at most."""

    def __post_init__(self) -> None:
        given = [value for value in dataclasses.astuple(self) if value is not None]
        if len(given) != 1:
            raise BudgetError("a budget is one of bits, size and loss; give exactly one")
        if not (math.isfinite(given[0]) and given[0] > 0):
            raise BudgetError(f"a budget of {given[0]} is impossible; it must be above 0")


@dataclass(frozen=True)
class Candidate:
    """What a layer may become: None is as it is."""

    how: LayerRecipe | None
    bytes: int
    loss: float
    """Predicted rise of the mean loss in nats (of a program without text, of its squared error)."""


Candidates = Mapping[str, Sequence[Candidate]]
"""By layer."""


def fit(
    program: ExportedProgram,
    target: Target,
    calibration: Any = None,
    *,
    recipe: Recipe | str = "joint-q",
    layouts: Iterable[str] = tuple(LAYOUTS),
    text: Any = None,
    progress: Progress | None = None,
) -> Recipe:
    """The recipe with the least predicted loss within a size, or the smallest within a loss.

    Args:
        calibration: as for `compress`.
        recipe: what holds for all layers: solver, kind of adapter, what to skip.
        layouts: those of `LAYOUTS` that a layer may have.
        text: held-out text that a loss is measured on, as in `slimfx.data`.

    Raises:
        BudgetError: the target is impossible; names the nearest possible.
    """
    base, tell = Recipe.load(recipe), progress or (lambda share, what: None)
    if target.loss is not None and not is_language_model(program):
        raise BudgetError("a loss is one of perplexity, which needs a language model; give a size")
    search = candidates(program, calibration, recipe=base, layouts=layouts, progress=tell)
    if target.size is not None:
        return _within_size(program, target.size, base, search)
    if target.loss is not None:
        return _within_loss(program, target.loss, base, search, (calibration, text, tell))
    assert target.bits is not None
    weights = sum(site.out_features * site.in_features for site in _sites(program, base))
    chosen = _within(search, target.bits * weights / 8)
    if chosen is None:
        least = 8 * sum(c.bytes for c in _smallest(search)) / weights
        raise BudgetError(
            f"{target.bits:g} bits a weight are impossible; the nearest possible is {least:.3f}"
        )
    return _recipe(base, search, chosen)


def candidates(
    program: ExportedProgram,
    calibration: Any = None,
    *,
    recipe: Recipe,
    layouts: Iterable[str] = tuple(LAYOUTS),
    progress: Progress | None = None,
) -> Candidates:
    """What each layer may become, its bytes exact, its loss predicted.

    Raises:
        BudgetError: the recipe or a layout is not one that can be searched.
    """
    layouts, tell = list(layouts), progress or (lambda share, what: None)
    if unknown := [name for name in layouts if name not in LAYOUTS]:
        raise BudgetError(f"layout {unknown[0]!r} is not one of {', '.join(LAYOUTS)}")
    sites = _sites(program, recipe)
    batches = data.batches(program, calibration, recipe.calibration)
    blocks = cut_blocks(program, sites)
    curves: dict[str, dict[str, Tensor]] = {}
    gains = dict.fromkeys(layouts, 1.0)
    with torch.random.fork_rng():
        tell(0.0, "sensitivity")
        few = batches[: max(1, _SENSITIVE_SAMPLES // recipe.calibration.batch)]
        matters = sensitivities(program, blocks, few, seed=recipe.calibration.seed)
        walk = calibrate.start(program, batches)
        holders = [block for block in blocks if block.sites]
        for block in blocks[: blocks.index(holders[-1]) + 1]:
            tell(0.1 + 0.9 * len(curves) / len(sites), block.name or "model")
            layers = _layers(walk, block, recipe, matters)
            curves |= {each.site.name: _curves(each, layouts) for each in layers}
            if block is holders[len(holders) // 2]:
                gains = {name: _gain(layers, name, curves) for name in layouts}
            walk = calibrate.advance(walk, block, {})
    return {
        site.name: _candidates(site, recipe, curves[site.name], gains)
        for site in sites
    }


def _sites(program: ExportedProgram, recipe: Recipe) -> list[Site]:
    """The linears that the recipe does not skip.

    Raises:
        BudgetError: there is none, or its solver's error is not what the search predicts.
    """
    hows = [(site, recipe.for_layer(site.name)) for site in find_linears(program)]
    for site, how in hows:
        full = how is None or how.adapter is None or how.adapter.full
        if how is not None and (how.solve.method != "joint" or how.scales_inputs or not full):
            raise BudgetError(
                f"{site.name}: a budget is searched for solve.method joint without a transform, "
                f"not {how.solve.method}; start from the preset joint or joint-q"
            )
    found = [site for site, how in hows if how is not None and not site.other_readers]
    if not found:
        raise BudgetError("no layer is left to compress; the recipe skips them all, or they are tied")
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
        stored, how = program.state_dict[site.fqn].detach().float(), recipe.for_layer(site.name)
        assert how is not None
        W = stored.T if site.transposed else stored
        weights = matters.get(site.name, W.new_zeros(len(W)))  # no output depends on it
        found.append(_Layer(site, how, W, stats[site.name], weights, site.bias is not None))
    return found


def _curves(layer: _Layer, layouts: Iterable[str]) -> dict[str, Tensor]:
    """For each possible layout, the loss that the best adapter leaves, by rank."""
    found = {}
    for layout in layouts:
        how = _how(layer.how, layout, 0)
        if not any(problems_of(layer.site, how)):
            found[layout] = left_by_rank(layer.left(how), layer.covariance, layer.matters)
    return found


def _gain(layers: list[_Layer], layout: str, curves: dict[str, dict[str, Tensor]]) -> float:
    """The loss of the joint solver in shares of what an adapter of its rank leaves by itself."""
    shares = []
    for layer in layers:
        curve, adapter = curves[layer.site.name].get(layout), layer.how.adapter
        if curve is None or adapter is None:
            continue
        rank = adapter.rank_for(*layer.W.shape)
        E, H = layer.left(_how(layer.how, layout, rank)), layer.covariance
        if curve[rank] > 0:
            shares.append((layer.matters @ ((E @ H) * E)).sum().item() / curve[rank].item())
    return sum(shares) / len(shares) if shares else 1.0


def _how(base: LayerRecipe, layout: str, rank: int) -> LayerRecipe:
    """A layer's recipe with another layout and rank."""
    prune, bits = LAYOUTS[layout]
    return dataclasses.replace(
        base,
        prune=prune,
        quantize=dataclasses.replace(base.quantize or Quantize(), bits=bits),
        adapter=dataclasses.replace(base.adapter, rank=rank) if base.adapter and rank else None,
    )


def _candidates(
    site: Site,
    recipe: Recipe,
    curves: Mapping[str, Tensor],
    gains: Mapping[str, float],
) -> list[Candidate]:
    base, smaller = recipe.for_layer(site.name), min(site.out_features, site.in_features)
    assert base is not None
    ranks = range(0, int(_LARGEST * smaller) + 1, max(1, smaller // _RANKS))
    found = [Candidate(None, site.out_features * site.in_features * site.dtype.itemsize, 0.0)]
    for layout, curve in curves.items():
        for rank in ranks if base.adapter else [0]:
            how = _how(base, layout, rank)
            loss = curve[rank].item() * (gains[layout] if rank else 1.0)
            found.append(Candidate(how, row_of(site, how).bytes_after, loss))
    return found


def _smallest(search: Candidates) -> list[Candidate]:
    return [min(each, key=lambda c: (c.bytes, c.loss)) for each in search.values()]


def _within(search: Candidates, limit: float) -> list[Candidate] | None:
    """The candidates of all layers with the least loss in so many bytes; None if none fit."""
    places = [[Option(c.bytes, c.loss) for c in each] for each in search.values()]
    chosen = allocate(places, limit)
    return chosen and [each[i] for each, i in zip(search.values(), chosen, strict=True)]


def _within_size(
    program: ExportedProgram, size: float, base: Recipe, search: Candidates
) -> Recipe:
    """The recipe whose file, with all that stays in it, is planned to have at most `size` bytes."""
    recipe = _recipe(base, search, _smallest(search))
    least = plan(program, recipe).file_bytes
    limit = size - least + sum(c.bytes for c in _smallest(search))
    while chosen := _within(search, limit):
        recipe = _recipe(base, search, chosen)
        over = plan(program, recipe).file_bytes - size
        if over <= 0:
            return recipe
        limit -= over
    raise BudgetError(
        f"a file of {int(size):,} bytes is impossible; the nearest possible is {least:,}"
    )


def _within_loss(
    program: ExportedProgram,
    loss: float,
    base: Recipe,
    search: Candidates,
    given: tuple[Any, Any, Progress],
) -> Recipe:
    """The smallest recipe whose measured loss holds, found by correcting what was predicted."""
    calibration, text, tell = given
    places = [[Option(c.loss, c.bytes) for c in each] for each in search.values()]
    dense = evaluate(program, text, samples=_WINDOWS).value
    limit, holds, fails, nearest = math.log1p(loss), 0.0, math.inf, math.inf
    allowed, best = limit, None
    for attempt in range(_TRIES):
        tell(1.0, f"try {attempt + 1}")
        chosen = allocate(places, allowed)
        assert chosen is not None  # every layer may stay as it is
        recipe = _recipe(base, search, [c[i] for c, i in zip(search.values(), chosen, strict=True)])
        small = compress(program, recipe, calibration)
        found = math.log(evaluate(small, text, samples=_WINDOWS).value / dense)
        nearest = min(nearest, found)
        if found <= limit:
            best, holds = recipe, allowed
        else:
            fails = allowed
        if limit * _CLOSE <= found <= limit:
            break
        allowed = _next(allowed * limit / found if found > 0 else 2 * allowed, holds, fails)
    if best is None:
        raise BudgetError(
            f"a loss of {loss:.2%} was not reached; the nearest that was is "
            f"{math.expm1(nearest):.2%}; start from a smaller one, or give a size"
        )
    return best


def _next(guess: float, holds: float, fails: float) -> float:
    """A guess a little on the safe side, or the middle of what is known if it is outside."""
    guess *= (1 + _CLOSE) / 2
    if holds < guess < fails:
        return guess
    return (holds + fails) / 2 if math.isfinite(fails) else 2 * holds


def _recipe(base: Recipe, search: Candidates, chosen: Sequence[Candidate]) -> Recipe:
    """An ordinary recipe with an override for each layer.

    Raises:
        BudgetError: every layer is to stay as it is.
    """
    pairs = sorted(zip(search, chosen, strict=True), key=lambda pair: len(pair[0]))
    if all(choice.how is None for _, choice in pairs):
        raise BudgetError(
            f"the layers as they are fit into the budget, with {sum(c.bytes for c in chosen):,} "
            f"bytes; nothing is to be compressed"
        )
    return dataclasses.replace(
        base,
        skip=(*base.skip, *(escape(name) for name, choice in pairs if choice.how is None)),
        overrides=(
            *base.overrides,
            *(_override(name, choice.how) for name, choice in pairs if choice.how is not None),
        ),
    )


def _override(name: str, how: LayerRecipe) -> Override:
    assert how.quantize is not None
    return Override(
        match=escape(name),  # patterns also match the end of a name: shorter names come first
        prune=how.prune and dataclasses.asdict(how.prune),
        quantize={"bits": how.quantize.bits},
        adapter=how.adapter and {"rank": how.adapter.rank},
    )
