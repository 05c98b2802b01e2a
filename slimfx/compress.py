"""Compress a program: plan -> (block by block: calibrate, solve) -> pack -> replace -> report."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx import calibrate, data
from slimfx.calibrate import Values, Walk
from slimfx.errors import CalibrationError, PlanError
from slimfx.journal import (
    Journal,
    Layers,
    batches_after,
    begin,
    digest,
    finished,
    keep_live,
    layers_of,
    write,
)
from slimfx.mask_file import check_names, mask_for, read_masks
from slimfx.methods.absmax import absmax
from slimfx.methods.quantized import quantize
from slimfx.methods.stats import Stats
from slimfx.pack_solution import pack_solution
from slimfx.passes.cut_blocks import Block, cut_blocks
from slimfx.passes.find_linears import Site, find_linears
from slimfx.passes.observe_inputs import observe_inputs
from slimfx.passes.replace_linears import replace_linears
from slimfx.passes.replace_tables import replace_tables
from slimfx.plan import PlanRow, plan, tables_to_replace
from slimfx.ranks import ALONE, Ranks
from slimfx.recipe import Recipe
from slimfx.runtime.manifest import LayerReport, Manifest, attach, manifest_of
from slimfx.runtime.pack import FLOAT_BITS, PackedDense, pack_codes
from slimfx.runtime.unread import give_back, place_of, read
from slimfx.solve import Solution, learnable, learned_solution, solve
from slimfx.steps import LayerRecipe
from slimfx.tune import tune

Progress = Callable[[float, str], None]
"""Called with the share of the work that is done and the name of what is next."""


def compress(
    program: ExportedProgram,
    recipe: Recipe | str = "joint",
    calibration: Any = None,
    *,
    progress: Progress | None = None,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> ExportedProgram:
    """A compressed copy of an exported program; the program, its tensors and global random state
    are unchanged.

    Args:
        program: any exported program with linears; its dynamic shapes survive.
        recipe: a Recipe, a preset's name or the path of a YAML file; one with a budget is searched
            first, as `slimfx.budget.fit` does.
        calibration: a source as in `slimfx.data`; None takes the English that comes with Python.
        progress: told how far the work is.
        journal: keeps each block as it is finished, and has those an earlier run of the same job
            finished; the result is to be saved before it is closed, since tensors stay in it.
        ranks: the processes that call this with the same arguments and share the work; the journal
            must be in a folder that all of them see. All get the same result.

    Raises:
        PlanError, BudgetError, CalibrationError, SolveError: nothing is half done; the message
            names the layers.
        JournalError: the journal is of another job; names what differs.
        SlimError: another process has ended.
    """
    recipe, tell = Recipe.load(recipe), progress or (lambda share, what: None)
    if any(tensor.is_meta and place_of(tensor) is None for tensor in program.state_dict.values()):
        raise PlanError('the program has no weights: capture it with weights=True or "unread"')
    if recipe.budget is not None:
        from slimfx.budget import fit  # compresses, too

        first = partial(_tell_share, tell, 0.0, 0.5)
        recipe = fit(
            *(program, recipe.budget, calibration), recipe=recipe, progress=first, ranks=ranks
        )
        tell = partial(_tell_share, tell, 0.5, 0.5)
    planned = {row.name: row for row in plan(program, recipe).rows}
    skipped = {row.name: row.skipped for row in planned.values() if row.skipped}
    sites = [site for site in find_linears(program) if site.name not in skipped]
    layers = {site.name: _layer(recipe, site) for site in sites}
    job = _Job(program, recipe, planned, sites, layers, _masks(sites, layers), journal)
    batches = data.batches(program, calibration, recipe.calibration)
    made = {"batches": len(batches), "sha256": data.digest(program, batches)}
    if journal is not None:
        ranks.once(lambda: begin(journal, _fingerprint(job, made)))

    found: Layers = {}
    halved = recipe.calibration.activations == "bfloat16"
    walk = calibrate.start(program, batches, ranks, halved=halved)
    for finished_layers in _blocks(job, walk, tell):
        found |= finished_layers
    packed = {name: linear for name, (linear, _) in found.items()}
    reports = [report for _, report in found.values()]
    compressed = replace_linears(program, sites, packed)
    compressed = replace_tables(compressed, _tables(program, recipe))
    return attach(compressed, _manifest(job, made, reports, skipped))


@dataclass(frozen=True)
class _Job:
    """What is to be done to which layers."""

    program: ExportedProgram
    recipe: Recipe
    rows: dict[str, PlanRow]
    sites: list[Site]
    layers: dict[str, LayerRecipe]
    masks: dict[str, Tensor]
    """Of the layers whose recipe takes them from a file."""
    journal: Journal | None


def _layer(recipe: Recipe, site: Site) -> LayerRecipe:
    how = recipe.for_layer(site.name)
    assert how is not None, f"{site.name} is skipped"
    return how


def _fingerprint(job: _Job, made: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a job comes to."""
    return {
        "program": hashlib.sha256(str(job.program.graph).encode()).hexdigest(),
        "weights": digest(job.program.state_dict),
        "masks": digest(job.masks),
        "recipe": job.recipe.to_dict(),
        "data": made,
        "versions": _versions(),
    }


def _blocks(job: _Job, walk: Walk, tell: Progress) -> Iterator[Layers]:
    """The compressed layers of each block, one after the other; of a journal, those it has."""
    blocks, journal = cut_blocks(job.program, job.sites), job.journal
    last = max(i for i, block in enumerate(blocks) if block.sites)
    first, missed = 0, []
    if journal is not None:
        first = walk.ranks.once(lambda: finished(journal))
        for number in range(first):
            missed += _unreached(layers := layers_of(journal, number))
            yield layers
        if 0 < first <= last:
            walk = _behind(job.program, walk, journal, first - 1)
    sizes = [sum(s.out_features * s.in_features for s in block.sites) for block in blocks]
    for number, block in enumerate(blocks[first : last + 1], first):
        before, share = sum(sizes[:number]) / sum(sizes), sizes[number] / sum(sizes)
        told = partial(_tell_share, tell, before, share)
        found, batches = _block(job, walk, block, told, more=number < last)
        missed += _unreached(found)
        _check_coverage(missed, len(job.sites), job.recipe.calibration.min_coverage)
        if journal is None:
            walk = replace(walk, batches=dict(batches))
        else:
            _write(walk, journal, number, found, batches)
            found = layers_of(journal, number)
            walk = _behind(job.program, walk, journal, number)
        give_back()
        yield found


def _write(
    walk: Walk,
    journal: Journal,
    number: int,
    found: Layers,
    batches: Iterator[tuple[int, Values]],
) -> None:
    """Finish a block in the journal: each process keeps its batches, the first the layers."""
    ranks, live = walk.ranks, dict[str, Any]()
    for described in ranks.each(range(ranks.size), lambda _: keep_live(journal, number, batches)):
        live |= described
    ranks.once(lambda: write(journal, number, found, live))


def _behind(program: ExportedProgram, walk: Walk, journal: Journal, number: int) -> Walk:
    """The walk behind a block of the journal."""
    return replace(walk, batches=batches_after(journal, number, program, walk.batches))


def _tell_share(tell: Progress, before: float, share: float, done: float, what: str) -> None:
    tell(before + share * done, what)


def _block(
    job: _Job, walk: Walk, block: Block, tell: Progress, *, more: bool
) -> tuple[Layers, Iterator[tuple[int, Values]]]:
    """The compressed layers of a block and, if there are `more`, what reaches the next one."""
    program, layers = job.program, job.layers
    tell(0.0, block.name or "model")
    full = frozenset(name for name, how in layers.items() if how.needs_covariance)
    watched = observe_inputs(program, block.sites, set(block.nodes))
    stats = calibrate.observe(walk, block, watched, full) if watched else {}
    solved: dict[str, Solution] = {}

    def solution_of(site: Site) -> Solution:
        return solve(
            *(site.name, _weight(program, site), stats[site.name], layers[site.name]),
            mask=job.masks.get(site.name),
            has_bias=_bias(program, site) is not None,
        )

    alike = sorted(block.sites, key=lambda site: -site.out_features * site.in_features)
    for site, solution in zip(alike, walk.ranks.each(alike, solution_of), strict=True):
        solved[site.name] = solution
        tell(len(solved) / len(block.sites), site.name)
    if job.recipe.tune is not None and block.sites:
        tell(1.0, f"tune {block.name}")
        solved = _tuned(job, walk, block, stats, solved)
    found: Layers = {}
    weights: dict[str, Tensor] = {}
    for site in block.sites:
        solution = solved[site.name]
        weights |= _as_stored(program, site, solution)
        report = _report(job.rows[site.name], solution, stats[site.name].tokens)
        found[site.name] = pack_solution(solution, layers[site.name], _bias(program, site)), report
    return found, calibrate.advance(walk, block, weights) if more else iter(())


def _unreached(layers: Layers) -> list[str]:
    return [name for name, (_, report) in layers.items() if report.tokens == 0]


def _check_coverage(missed: list[str], layers: int, least: float) -> None:
    """Refuse when tokens have missed more layers than the recipe allows."""
    if 1 - len(missed) / layers < least:
        more = f" ({len(missed)} of {layers} layers so far)" if len(missed) > 1 else ""
        raise CalibrationError(
            f"{missed[-1]}: no calibration token reached it{more}; give more data, add it to skip, "
            f"or lower calibration.min_coverage ({least}), for it to take all inputs alike"
        )


def _tuned(
    job: _Job, walk: Walk, block: Block, stats: dict[str, Stats], solved: dict[str, Solution]
) -> dict[str, Solution]:
    """The solutions of a block after gradient descent on what the block answers."""
    how = job.recipe.tune
    assert how is not None
    sites = {site.fqn: site for site in block.sites}
    whole: dict[str, Tensor] = {}  # all parameters as compressed, biases among them
    for site in block.sites:
        whole |= _as_stored(job.program, site, solved[site.name])
    learnables = {
        fqn: learnable(_weight(job.program, site), solved[site.name], job.layers[site.name])
        for fqn, site in sites.items()
    }
    learned = tune(
        *(walk, block, learnables),
        lambda fqn, dense: _in_form_of(sites[fqn], dense),
        fixed=whole,
        epochs=how.epochs,
        rate=how.rate,
        seed=job.recipe.calibration.seed,
    )
    return {
        site.name: learned_solution(
            *(site.name, _weight(job.program, site), stats[site.name], job.layers[site.name]),
            solved[site.name],
            learnables[fqn].finish(learned[fqn]),
        )
        for fqn, site in sites.items()
    }


def _masks(sites: list[Site], recipes: dict[str, LayerRecipe]) -> dict[str, Tensor]:
    """The masks of the layers whose recipe takes them from a file, checked before any compute."""
    prunes = {name: how.prune for name, how in recipes.items() if how.prune is not None}
    paths = sorted({prune.path for prune in prunes.values() if prune.path is not None})
    files = {path: read_masks(path) for path in paths}
    for file in files.values():
        check_names(file, [site.name for site in sites])
    masks = {}
    for site in sites:
        prune = prunes.get(site.name)
        if prune is not None and prune.path is not None:
            shape = (site.out_features, site.in_features)
            masks[site.name] = mask_for(site.name, files[prune.path], shape, prune.pattern)
    return masks


def _tables(program: ExportedProgram, recipe: Recipe) -> dict[str, PackedDense | Tensor]:
    """The embeddings as they are stored."""
    found: dict[str, PackedDense | Tensor] = {}
    for table in tables_to_replace(program, recipe):
        weight = read(program.state_dict[table.fqn]).detach()
        if recipe.embeddings == FLOAT_BITS:
            found[table.fqn] = weight.to(torch.bfloat16)
            continue
        scale, width = absmax(weight, bits=8, granularity="channel", group=1), table.shape[1]
        coded = quantize(weight, scale, group=width, bits=8)
        found[table.fqn] = PackedDense(pack_codes(coded.codes, 8), coded.scale, 8, width)
    return found


def _weight(program: ExportedProgram, site: Site) -> Tensor:
    stored = read(program.state_dict[site.fqn]).detach()
    return stored.T if site.transposed else stored


def _bias(program: ExportedProgram, site: Site) -> Tensor | None:
    """The layer's own bias, if it is one value for each output."""
    if site.bias is None or program.state_dict[site.bias].shape != (site.out_features,):
        return None
    return read(program.state_dict[site.bias]).detach()


def _as_stored(program: ExportedProgram, site: Site, solution: Solution) -> dict[str, Tensor]:
    """The layer's parameters as the compressed layer has them, for the blocks behind it."""
    found = {site.fqn: _in_form_of(site, solution.dense())}
    bias = _bias(program, site)
    if bias is not None and solution.bias_shift is not None:
        assert site.bias is not None
        found[site.bias] = (bias.float() + solution.bias_shift).to(bias.dtype)
    return found


def _in_form_of(site: Site, dense: Tensor) -> Tensor:
    """A weight [N, K] as the program holds it."""
    stored = dense.to(site.dtype)
    return stored.T if site.transposed else stored


def _report(row: PlanRow, solution: Solution, tokens: int) -> LayerReport:
    return LayerReport(
        name=row.name,
        out_features=row.out_features,
        in_features=row.in_features,
        layout=row.layout,
        rank=row.rank,
        bytes=row.bytes_after,
        tokens=tokens,
        snr=round(solution.snr, 3),
        snr_without_adapter=round(solution.snr_without_adapter, 3),
        clipped=round(solution.clipped, 6),
        notes=solution.notes,
        spectrum=tuple(round(share, 3) for share in solution.spectrum),
    )


def _versions() -> dict[str, str]:
    return {
        "slimfx": version("slimfx"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _manifest(
    job: _Job, made: dict[str, Any], reports: list[LayerReport], skipped: dict[str, str]
) -> Manifest:
    own = manifest_of(job.program)
    return Manifest(
        recipe=job.recipe.to_dict(),
        layers=tuple(reports),
        skipped=skipped,
        calibration={**made, "coverage": sum(r.tokens > 0 for r in reports) / len(reports)},
        versions=_versions(),
        tokenizer=own.tokenizer,
        eos_token=own.eos_token,
        model_files=own.model_files,
    )
