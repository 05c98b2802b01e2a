"""Compress a program: plan -> (block by block: calibrate, solve) -> pack -> replace -> report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx import calibrate, data
from slimfx.methods.quantized import Quantized
from slimfx.passes.cut_blocks import cut_blocks
from slimfx.passes.find_linears import Site, find_linears
from slimfx.passes.observe_inputs import observe_inputs
from slimfx.passes.replace_linears import replace_linears
from slimfx.plan import PlanRow, plan
from slimfx.recipe import Recipe
from slimfx.runtime.manifest import LayerReport, Manifest, attach, manifest_of
from slimfx.runtime.pack import Packed24, PackedInt4, PackedLinear, pack_24, pack_nibbles
from slimfx.solve import Solution, solve

Progress = Callable[[float, str], None]
"""Called with the share of the work that is done and the name of what is next."""


def compress(
    program: ExportedProgram,
    recipe: Recipe | str = "slim",
    calibration: Any = None,
    *,
    progress: Progress | None = None,
) -> ExportedProgram:
    """A compressed copy of an exported program; the program, its tensors and global random state
    are unchanged.

    Args:
        program: any exported program with linears; its dynamic shapes survive.
        recipe: a Recipe, a preset's name or the path of a YAML file.
        calibration: a source as in `slimfx.data`; None takes the English that comes with Python.
        progress: told how far the work is.

    Raises:
        PlanError, CalibrationError, SolveError: nothing is half done; the message names the layers.
    """
    recipe = Recipe.load(recipe)
    planned = {row.name: row for row in plan(program, recipe).rows}
    skipped = {row.name: row.skipped for row in planned.values() if row.skipped}
    sites = [site for site in find_linears(program) if site.name not in skipped]
    batches = data.batches(program, calibration, recipe.calibration)
    tell = progress or (lambda share, what: None)

    packed: dict[str, PackedLinear] = {}
    reports: list[LayerReport] = []
    with torch.random.fork_rng():  # a program exported in training mode may draw
        for site, solution, tokens in _solutions(program, recipe, sites, batches, tell):
            packed[site.name] = pack(solution, planned[site.name].layout)
            reports.append(_report(planned[site.name], solution, tokens))
    compressed = replace_linears(program, sites, packed)
    return attach(compressed, _manifest(program, recipe, batches, reports, skipped))


def _solutions(
    program: ExportedProgram, recipe: Recipe, sites: list[Site], batches: list[Any], tell: Progress
) -> Iterator[tuple[Site, Solution, int]]:
    """Each site with its solution and its calibration tokens, block by block."""
    recipes = {site.name: recipe.for_layer(site.name) for site in sites}
    full = frozenset(name for name, how in recipes.items() if how and how.needs_covariance)
    blocks = cut_blocks(program, sites)
    last = max(i for i, block in enumerate(blocks) if block.sites)
    sizes = {site.name: site.out_features * site.in_features for site in sites}
    total, done = sum(sizes.values()), 0
    walk = calibrate.start(program, batches)
    for block in blocks[: last + 1]:
        tell(done / total, block.name or "model")
        watched = observe_inputs(program, block.sites, set(block.nodes))
        stats = calibrate.observe(walk, block, watched, full) if watched else {}
        weights: dict[str, Tensor] = {}
        for site in block.sites:
            how = recipes[site.name]
            assert how is not None
            solution = solve(site.name, _weight(program, site), stats[site.name], how)
            weights[site.fqn] = _as_stored(solution, site)
            yield site, solution, stats[site.name].tokens
            done += sizes[site.name]
            tell(done / total, site.name)
        if block is not blocks[last]:
            walk = calibrate.advance(walk, block, weights)


def pack(solution: Solution, layout: str) -> PackedLinear:
    """The stored form of a solution; `layout` as the plan names it."""
    weight = solution.weight
    main: Packed24 | PackedInt4
    if layout == "2:4 int4":
        values, indices = pack_24(weight.codes)
        main = Packed24(values, indices, weight.scale)
    else:
        main = _pack_int4(weight)
    return PackedLinear(main, _pack_adapter(solution.L), _pack_adapter(solution.R))


def _pack_adapter(matrix: Quantized | Tensor | None) -> PackedInt4 | Tensor | None:
    return _pack_int4(matrix) if isinstance(matrix, Quantized) else matrix


def _pack_int4(matrix: Quantized) -> PackedInt4:
    return PackedInt4(pack_nibbles(matrix.codes), matrix.scale, matrix.group)


def _weight(program: ExportedProgram, site: Site) -> Tensor:
    stored = program.state_dict[site.fqn].detach()
    return stored.T if site.transposed else stored


def _as_stored(solution: Solution, site: Site) -> Tensor:
    dense = solution.dense().to(site.dtype)
    return dense.T if site.transposed else dense


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
    )


def _manifest(
    program: ExportedProgram,
    recipe: Recipe,
    batches: list[Any],
    reports: list[LayerReport],
    skipped: dict[str, str],
) -> Manifest:
    own = manifest_of(program)
    return Manifest(
        recipe=recipe.to_dict(),
        layers=tuple(reports),
        skipped=skipped,
        calibration={"batches": len(batches), "sha256": data.digest(program, batches)},
        versions={
            "slimfx": version("slimfx"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        tokenizer=own.tokenizer,
        eos_token=own.eos_token,
    )
