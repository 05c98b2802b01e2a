"""Compress a program: plan -> (block by block: calibrate, solve) -> pack -> replace -> report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx import calibrate, data
from slimfx.calibrate import Walk
from slimfx.errors import PlanError
from slimfx.mask_file import check_names, mask_for, read_masks
from slimfx.methods.masks import keep
from slimfx.methods.quantized import Quantized
from slimfx.methods.stats import Stats
from slimfx.passes.cut_blocks import Block, cut_blocks
from slimfx.passes.find_linears import Site, find_linears
from slimfx.passes.observe_inputs import observe_inputs
from slimfx.passes.replace_linears import replace_linears
from slimfx.plan import PlanRow, adapter_layout, layout_of, plan
from slimfx.recipe import Recipe
from slimfx.runtime.manifest import LayerReport, Manifest, attach, manifest_of
from slimfx.runtime.pack import (
    FLOAT_BITS,
    Layout,
    Packed24,
    PackedBitmask,
    PackedDense,
    PackedLinear,
    PackedMatrix,
    pack_24,
    pack_bitmask,
    pack_codes,
)
from slimfx.runtime.unread import place_of, read
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
    if any(tensor.is_meta and place_of(tensor) is None for tensor in program.state_dict.values()):
        raise PlanError('the program has no weights: capture it with weights=True or "unread"')
    planned = {row.name: row for row in plan(program, recipe).rows}
    skipped = {row.name: row.skipped for row in planned.values() if row.skipped}
    sites = [site for site in find_linears(program) if site.name not in skipped]
    layers = {site.name: _layer(recipe, site) for site in sites}
    job = _Job(program, recipe, sites, layers, _masks(sites, layers))
    batches = data.batches(program, calibration, recipe.calibration)
    tell = progress or (lambda share, what: None)

    packed: dict[str, PackedLinear] = {}
    reports: list[LayerReport] = []
    with torch.random.fork_rng():  # a program exported in training mode may draw
        walk = calibrate.start(program, batches)
        for site, solution, tokens in _solutions(job, walk, tell):
            packed[site.name] = pack(solution, layers[site.name], _bias(program, site))
            reports.append(_report(planned[site.name], solution, tokens))
    compressed = replace_linears(program, sites, packed)
    return attach(compressed, _manifest(program, recipe, batches, reports, skipped))


@dataclass(frozen=True)
class _Job:
    """What is to be done to which layers."""

    program: ExportedProgram
    recipe: Recipe
    sites: list[Site]
    layers: dict[str, LayerRecipe]
    masks: dict[str, Tensor]
    """Of the layers whose recipe takes them from a file."""


def _layer(recipe: Recipe, site: Site) -> LayerRecipe:
    how = recipe.for_layer(site.name)
    assert how is not None, f"{site.name} is skipped"
    return how


def _solutions(job: _Job, walk: Walk, tell: Progress) -> Iterator[tuple[Site, Solution, int]]:
    """Each site with its solution and its calibration tokens, block by block."""
    program, layers = job.program, job.layers
    full = frozenset(name for name, how in layers.items() if how.needs_covariance)
    blocks = cut_blocks(program, job.sites)
    last = max(i for i, block in enumerate(blocks) if block.sites)
    sizes = {site.name: site.out_features * site.in_features for site in job.sites}
    total, done = sum(sizes.values()), 0
    for block in blocks[: last + 1]:
        tell(done / total, block.name or "model")
        here = calibrate.read_block(walk, block)
        watched = observe_inputs(program, block.sites, set(block.nodes))
        stats = calibrate.observe(here, block, watched, full) if watched else {}
        solved: dict[str, Solution] = {}
        for site in block.sites:
            solved[site.name] = solve(
                *(site.name, _weight(program, site), stats[site.name], layers[site.name]),
                mask=job.masks.get(site.name),
                has_bias=_bias(program, site) is not None,
            )
            done += sizes[site.name]
            tell(done / total, site.name)
        if job.recipe.tune is not None and block.sites:
            tell(done / total, f"tune {block.name}")
            solved = _tuned(job, here, block, stats, solved)
        weights: dict[str, Tensor] = {}
        for site in block.sites:
            weights |= _as_stored(program, site, solved[site.name])
            yield site, solved[site.name], stats[site.name].tokens
        if block is not blocks[last]:
            walk = replace(walk, batches=calibrate.advance(here, block, weights).batches)


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


def pack(solution: Solution, how: LayerRecipe, bias: Tensor | None = None) -> PackedLinear:
    """The stored form of a solution; `bias` is the layer's own, which a bias shift is added to."""
    weight, shift = solution.weight, solution.bias_shift
    mask = None
    if how.pattern is not None:  # every non-zero value, and zeros up to the number that stays
        values = weight.codes if isinstance(weight, Quantized) else weight
        mask = keep((values != 0).float(), how.pattern)
    shifted = None if bias is None or shift is None else (bias.float() + shift).to(bias.dtype)
    L = R = Layout("dense", FLOAT_BITS)
    if how.adapter is not None:
        L, R = adapter_layout(how.adapter), Layout("dense", how.adapter.bits)
    return PackedLinear(
        weight=_pack(weight, layout_of(how), mask),
        L=None if solution.L is None else _pack_adapter(solution.L, L),
        R=None if solution.R is None else _pack_adapter(solution.R, R),
        input_scale=solution.input_scale,
        bias=shifted,
        fp8=how.inputs is not None,
    )


def _pack_adapter(matrix: Quantized | Tensor, layout: Layout) -> PackedMatrix | Tensor:
    if isinstance(matrix, Tensor) and layout.where == "dense":
        return matrix
    return _pack(matrix, layout, None)


def _pack(matrix: Quantized | Tensor, layout: Layout, mask: Tensor | None) -> PackedMatrix:
    scale: Tensor | None
    if isinstance(matrix, Quantized):
        values, scale, group = matrix.codes, matrix.scale, matrix.group
    else:
        values, scale, group = matrix, None, matrix.shape[1]
    if layout.where == "2:4":
        return Packed24(*pack_24(values, layout.bits), scale, layout.bits, group)
    if layout.where == "bitmask":
        assert mask is not None
        return PackedBitmask(*pack_bitmask(values, mask, layout.bits), scale, layout.bits, group)
    assert scale is not None
    return PackedDense(pack_codes(values, layout.bits), scale, layout.bits, group)


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
        model_files=own.model_files,
    )
