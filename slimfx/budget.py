"""Make it fit: from a size, a time or a loss to a recipe with settings of its own for each layer.

`candidates` says what each layer may become, `allocate` chooses; a loss is then measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from glob import escape
from typing import Any

import torch
from torch.export import ExportedProgram

from slimfx.candidates import LAYOUTS, Candidate, Candidates, Progress, candidates, linears_of
from slimfx.compress import compress
from slimfx.errors import BudgetError
from slimfx.evaluate import evaluate
from slimfx.methods.allocate import Option, allocate
from slimfx.passes.find_linears import find_linears
from slimfx.plan import plan
from slimfx.ranks import ALONE, Ranks
from slimfx.recipe import Recipe
from slimfx.runtime.unread import place_of
from slimfx.sensitivity import is_language_model
from slimfx.steps import LayerRecipe, Override, Target

_TRIES, _CLOSE = 4, 0.9
"""Attempts at most until a size or loss holds, and the share of a loss that is near enough."""
_WINDOWS = 48
"""Of held-out text."""


def fit(
    program: ExportedProgram,
    target: Target,
    calibration: Any = None,
    *,
    recipe: Recipe | str = "joint-q",
    layouts: Iterable[str] = tuple(LAYOUTS),
    text: Any = None,
    remembered: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Recipe:
    """The recipe with the least predicted loss within a size, or the smallest within a loss.

    Args:
        calibration: as for `compress`.
        recipe: what holds for all layers: solver, kind of adapter, what to skip; its own budget
            does not count.
        layouts: those of `LAYOUTS` that a layer may have.
        text: held-out text that a loss is measured on, as in `slimfx.data`.
        remembered, ranks: as for `candidates`.

    Raises:
        BudgetError: the target is impossible; names the nearest possible.
    """
    base, tell = Recipe.load(recipe), progress or (lambda share, what: None)
    base = dataclasses.replace(base, budget=None)
    meta = [tensor for tensor in program.state_dict.values() if tensor.is_meta]
    if any(place_of(tensor) is None for tensor in meta):
        raise BudgetError('the program has no weights: capture it with weights=True or "unread"')
    if target.loss is not None and not is_language_model(program):
        raise BudgetError("a loss is one of perplexity, which needs a language model; give a size")
    if target.loss is not None and meta:
        raise BudgetError("a loss is measured on the whole program: capture with weights=True")
    search = candidates(
        *(program, calibration),
        recipe=base,
        layouts=layouts,
        remembered=remembered,
        progress=tell,
        ranks=ranks,
    )
    if target.loss is not None:
        return _within_loss(program, target.loss, base, search, (calibration, text, tell), ranks)
    return choose(program, target, base, search, ranks)


def choose(
    program: ExportedProgram,
    target: Target,
    base: Recipe,
    search: Candidates,
    ranks: Ranks = ALONE,
) -> Recipe:
    """The recipe for bits, a size or a latency out of a search made before, for any of them.

    Raises:
        BudgetError: as `fit`.
    """
    if target.size is not None:
        return _within_size(program, target.size, base, search)
    if target.latency is not None:
        return _within_latency(program, target.latency, base, search, ranks)
    assert target.bits is not None
    weights = sum(site.out_features * site.in_features for site in linears_of(program, base))
    chosen = _within(search, target.bits * weights / 8)
    if chosen is None:
        least = 8 * sum(c.bytes for c in _smallest(search)) / weights
        raise BudgetError(
            f"{target.bits:g} bits a weight are impossible; the nearest possible is {least:.3f}"
        )
    return _recipe(base, search, chosen)


def _smallest(search: Candidates) -> list[Candidate]:
    return [min(each, key=lambda c: (c.bytes, c.loss)) for each in search.values()]


def _within(search: Candidates, limit: float) -> list[Candidate] | None:
    """The candidates of all layers with the least loss in so many bytes; None if none fit."""
    places = [[Option(c.bytes, c.loss) for c in each] for each in search.values()]
    chosen = allocate(places, limit)
    return None if chosen is None else _picked(search, chosen)


def _picked(search: Candidates, chosen: Sequence[int]) -> list[Candidate]:
    return [each[i] for each, i in zip(search.values(), chosen, strict=True)]


def _within_size(program: ExportedProgram, size: float, base: Recipe, search: Candidates) -> Recipe:
    """The recipe whose file, with all that stays in it, is planned to have at most `size` bytes."""
    chosen: list[Candidate] | None = _smallest(search)
    best, largest, least = None, 0, 0
    for _ in range(_TRIES):  # how much else is in the file depends a little on the choice
        if chosen is None:
            break
        recipe = _recipe(base, search, chosen)
        planned = plan(program, recipe).file_bytes
        least = least or planned
        if largest < planned <= size:
            best, largest = recipe, planned
        chosen = _within(search, size - planned + sum(c.bytes for c in chosen))
    if best is None:
        raise BudgetError(
            f"a file of {int(size):,} bytes is impossible; the nearest possible is {least:,}"
        )
    return best


def _within_latency(
    program: ExportedProgram, seconds: float, base: Recipe, search: Candidates, ranks: Ranks
) -> Recipe:
    """The recipe whose linears are measured to take so long at most, those it skips included; the
    first process measures.
    """
    from slimfx.latency import latencies  # loads the compiler, slow

    sites = find_linears(program)
    stays = [Candidate(None, 0, 0.0)]
    options = [search.get(site.name, stays) for site in sites]
    hows = ([c.how for c in each] for each in options)
    times = ranks.once(lambda: latencies(zip(sites, hows, strict=True)))
    places = [
        [Option(t, c.loss) for t, c in zip(*pair, strict=True)]
        for pair in zip(times, options, strict=True)
    ]
    chosen = allocate(places, seconds)
    if chosen is None:
        least = math.ceil(1e6 * sum(map(min, times))) / 1e3
        raise BudgetError(
            f"{1e3 * seconds:g} ms a token are impossible; the nearest possible on this processor "
            f"with {torch.get_num_threads()} threads is {least:.3f} ms"
        )
    named = {site.name: each[i] for site, each, i in zip(sites, options, chosen, strict=True)}
    return _recipe(base, search, [named[name] for name in search])


def _within_loss(
    program: ExportedProgram,
    loss: float,
    base: Recipe,
    search: Candidates,
    given: tuple[Any, Any, Progress],
    ranks: Ranks,
) -> Recipe:
    """The smallest recipe whose measured loss holds, found by correcting what was predicted."""
    calibration, text, tell = given
    places = [[Option(c.loss, c.bytes) for c in each] for each in search.values()]
    dense = ranks.once(lambda: evaluate(program, text, samples=_WINDOWS).value)
    limit, holds, fails, nearest = math.log1p(loss), 0.0, math.inf, math.inf
    allowed, best = limit, None
    for attempt in range(_TRIES):
        tell(1.0, f"try {attempt + 1}")
        chosen = allocate(places, allowed)
        if chosen is None:
            break
        recipe = _recipe(base, search, _picked(search, chosen))
        small = compress(program, recipe, calibration, ranks=ranks)
        measured = ranks.once(lambda: evaluate(small, text, samples=_WINDOWS).value)  # noqa: B023
        found = math.log(measured / dense)
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
            f"a loss of {loss:.2%} was not reached in {_TRIES} attempts; the nearest possible "
            f"that was found is {math.expm1(nearest):.2%}; give that, or a size"
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
            f"the best in the budget is the layers as they are, {sum(c.bytes for c in chosen):,}"
            f" bytes; nothing is to be compressed"
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
        adapter=how.adapter and dataclasses.asdict(how.adapter),
    )
