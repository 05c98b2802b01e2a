"""How long a compression will take on this machine, from short measurements of its parts.

Each kind of layer is solved as it is or, if that takes long, at smaller sizes of its proportions,
from which time goes on in its linear and its cubic part; matrix products, reading and saving are
timed. Threads are those of this process.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.export import ExportedProgram

from slimfx import calibrate
from slimfx.journal import digest
from slimfx.memory import batch_sizes
from slimfx.methods.stats import add_tokens, empty_stats
from slimfx.pack_solution import pack_solution
from slimfx.passes.cut_blocks import cut_blocks
from slimfx.passes.find_linears import Site, find_linears
from slimfx.passes.observe_inputs import observe_inputs
from slimfx.plan import plan
from slimfx.ranks import shares
from slimfx.recipe import Recipe
from slimfx.runtime.targets.pt2 import save
from slimfx.runtime.unread import places, read, unread
from slimfx.solve import solve
from slimfx.steps import LayerRecipe

_SMALLEST, _LARGEST = 2**18, 2**24
"""Weights of the layers that are solved, four times as many each time."""
_LONGEST = 1.5
"""Seconds after which no larger one is."""
_TOKENS = 512
_SAVED = 2**23
"""Weights of a program that is saved, and of a file that is read."""
_NODES = 200
"""Of another program that is saved, for what a file takes beside its weights."""


@dataclass(frozen=True)
class Seconds:
    """What a compression spends its time on."""

    read: float
    """Weights read for their checksum, and again block by block; the system has them cached."""
    calibrate: float
    """Batches through each block, once to observe its inputs, and the statistics of these."""
    solve: float
    """Layers solved and packed."""
    write: float
    """The file, written and loaded again."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.read + self.calibrate + self.solve + self.write


def predict(
    program: ExportedProgram, recipe: Recipe | str = "joint", processes: int = 1
) -> Seconds:
    """The seconds `slimfx compress` will take behind the capture with so many processes, each with
    this one's threads and a processor for every thread. Tuning is not counted, nor is the text.

    Raises:
        PlanError: as `plan`.
    """
    recipe = Recipe.load(recipe)
    planned = plan(program, recipe)
    sites = {row.name: site for row, site in zip(planned.rows, find_linears(program), strict=True)}
    chosen = [sites[row.name] for row in planned.rows if not row.skipped]
    solving = _solving(chosen, recipe, processes)
    return Seconds(
        read=planned.bytes_before * _reading(),
        calibrate=_flops(program, chosen, recipe, processes) / _flops_a_second(),
        solve=solving,
        write=_saving(planned.bytes_after, len(program.graph.nodes)),
    )


def _solving(sites: list[Site], recipe: Recipe, processes: int) -> float:
    """Layers are shared out one by one, the larger ones first."""
    kinds = Counter((recipe.for_layer(s.name), s.out_features, s.in_features) for s in sites)
    total = longest = 0.0
    for (how, N, K), count in kinds.items():
        assert how is not None
        seconds = _of_layer(how, N, K)
        total, longest = total + count * seconds, max(longest, seconds)
    return max(total / processes, longest)


def _of_layer(how: LayerRecipe, N: int, K: int) -> float:
    """Seconds to solve and pack a layer [N, K]."""
    size, w, found = _SMALLEST, N * K, list[tuple[int, float]]()
    while len(found) < 2 or (size <= _LARGEST and found[-1][1] < _LONGEST):
        shape = _scaled(N, K, math.sqrt(size / w)) if size < w else (N, K)
        found.append((math.prod(shape), _measured(how, *shape)))
        if size >= w:
            return found[-1][1]
        size *= 4
    (w1, t1), (w2, t2) = found[-2:]  # t = w (linear + cubic sqrt w), neither of them negative
    cubic = (t2 / w2 - t1 / w1) / (math.sqrt(w2) - math.sqrt(w1))
    cubic = min(max(cubic, 0.0), t2 / w2**1.5)
    return w * (t2 / w2 + cubic * (math.sqrt(w) - math.sqrt(w2)))


def _scaled(N: int, K: int, factor: float) -> tuple[int, int]:
    """A layer of the same proportions that groups and patterns fit."""
    return tuple(max(128, round(size * factor / 128) * 128) for size in (N, K))  # type: ignore[return-value]


def _measured(how: LayerRecipe, N: int, K: int) -> float:
    draw = torch.Generator().manual_seed(N + K)
    weight = torch.randn(N, K, generator=draw)
    x = torch.randn(_TOKENS, K, generator=draw)
    stats = add_tokens(empty_stats(K, covariance=how.needs_covariance), x)
    if how.prune is not None and how.prune.path is not None:  # any mask will do
        how = replace(how, prune=replace(how.prune, method="magnitude", path=None))
    return _fastest(lambda: pack_solution(solve("a layer", weight, stats, how), how))


def _flops(program: ExportedProgram, sites: list[Site], recipe: Recipe, processes: int) -> float:
    """Of the linears of all tokens and of the covariances; of the busiest process."""
    how = recipe.calibration
    sizes, rows = batch_sizes(program, how)
    batches = -(-how.samples // how.batch) if sizes else 1
    cut = shares(batches)
    busiest = max(sum(map(len, cut[i::processes])) for i in range(processes))
    full = {
        (use.x, site.in_features)
        for site in sites
        if (layer := recipe.for_layer(site.name)) is not None and layer.needs_covariance
        for use in site.uses
    }
    return 2 * busiest * rows * (_weights_met(program, sites) + sum(K**2 for _, K in full))


def _weights_met(program: ExportedProgram, sites: list[Site]) -> int:
    """Weights of the linears that a token meets: on its way through each block, and as far as it
    is observed.
    """
    sizes = {
        use.node: site.out_features * site.in_features
        for site in find_linears(program)
        for use in site.uses
    }
    blocks = cut_blocks(program, sites)
    while not blocks[-1].sites:  # none behind the last site is run
        blocks.pop()
    run = [node for block in blocks[:-1] for node in block.nodes]
    for block in blocks:
        if watched := observe_inputs(program, block.sites, set(block.nodes)):
            run += calibrate.observed(block, watched).nodes
    return sum(sizes.get(node, 0) for node in run)


def _flops_a_second() -> float:
    x, W = torch.randn(_TOKENS, 1024), torch.randn(2048, 1024)
    return 2 * _TOKENS * W.numel() / _fastest(lambda: x @ W.T)


def _reading() -> float:
    """Seconds a byte to read a weight for its checksum, and once more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight.safetensors"
        safetensors.torch.save_file({"weight": torch.ones(_SAVED)}, path)
        [place] = places(path).values()
        weight = unread(place, place.dtype)
        return _fastest(lambda: (digest({"weight": weight}), read(weight))) / weight.nbytes


def _saving(size: int, nodes: int) -> float:
    """Seconds to save a program of so many bytes and nodes: so many times those of small ones."""
    heavy = _to_save(nn.Linear(1024, _SAVED // 1024))
    long = _to_save(nn.Sequential(*[nn.ReLU() for _ in range(_NODES)]))
    return size / (4 * _SAVED) * heavy + nodes / _NODES * long


def _to_save(module: nn.Module) -> float:
    program = torch.export.export(module, (torch.ones(1, 1024),))
    with tempfile.TemporaryDirectory() as folder:
        return _fastest(lambda: save(program, Path(folder) / "program.pt2"))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds: of four runs, or of fewer that take 1.5 seconds; others on the machine disturb."""
    found: list[float] = []
    while len(found) < 4 and sum(found) < 1.5:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
