"""How long one layer takes to compress, by its size, beside SLiM's procedure as published.

python examples/reproduce/compression_time.py -o compression_time.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import study
import torch
from matplotlib.figure import Figure
from slimfx.runtime.unread import prepare_allocator
from torch import Tensor

import slimfx
from slimfx import Recipe, show
from slimfx.bench_solver import bench_solver
from slimfx.methods.masks import NofM, keep
from slimfx.methods.quantized import Quantized, quantize
from slimfx.methods.slim_histogram import slim_histogram
from slimfx.methods.slim_lora import saliency
from slimfx.methods.stats import add_tokens, empty_stats
from slimfx.methods.wanda import wanda

TOKENS = 4096


@dataclass(frozen=True)
class Row:
    """One recipe, or one solver of `bench_solver`, on a layer of size inputs and outputs."""

    kind: str
    """ "recipe" or "solver"."""
    name: str
    size: int
    seconds: float


def main(words: Sequence[str]) -> list[Row]:
    """For each size a row for each preset, two of slim, fast and as published, and the solvers'."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=study.numbers, default=(512, 1024, 2048))
    parser.add_argument("--presets", type=study.names, default=study.names(PRESETS))
    parser.add_argument("-o", "--output", type=Path, help="picture; its numbers go beside it")
    args = parser.parse_args(words)
    prepare_allocator()  # as `slimfx compress` does
    return study.finish(_rows(args.presets, [int(size) for size in args.sizes]), args.output, draw)


PAPER = "slim as published"
FAST = "slim, fast"
PRESETS = "wanda,sparsegpt,optq,slim,slim-q,full-lora,joint,joint-q"


def _rows(presets: Sequence[str], sizes: Sequence[int]) -> Iterator[Row]:
    with show.line("reproduce") as tell:
        for i, size in enumerate(sizes):
            draw_x = torch.Generator().manual_seed(0)
            x = torch.randn(TOKENS, size, generator=draw_x)
            torch.manual_seed(0)
            program = slimfx.capture(torch.nn.Linear(size, size, bias=False), (x[:2],))
            for name, recipe in [*((name, name) for name in presets), (FAST, fast_slim())]:
                tell(i / len(sizes), f"{name} {size}")
                began = time.perf_counter()
                slimfx.compress(program, recipe, calibration=[x])
                yield Row("recipe", name, size, time.perf_counter() - began)
            tell((i + 0.5) / len(sizes), f"{PAPER} {size}")
            began = time.perf_counter()
            as_published(program.state_dict["weight"], x)
            yield Row("recipe", PAPER, size, time.perf_counter() - began)
            for solver in bench_solver(size):
                yield Row("solver", solver.name, size, solver.seconds)


def fast_slim() -> Recipe:
    """slim with `adapter: {fast: true}`."""
    recipe = Recipe.preset("slim")
    assert recipe.adapter is not None
    return replace(recipe, adapter=replace(recipe.adapter, fast=True))


def as_published(weight: Tensor, x: Tensor) -> tuple[Quantized, Tensor, Tensor]:
    """SLiM's steps as the paper takes them (arXiv 2410.09615, algorithms 1 and 2): a loop over a
    histogram for the scale, and a full SVD for the adapter.
    """
    size = len(weight)
    stats = add_tokens(empty_stats(size), x)
    kept = weight * keep(wanda(weight, stats), NofM(2, 4))
    scale = slim_histogram(kept, bits=4, granularity="tensor", group=size)
    coded, importance, rank = quantize(kept, scale, group=size, bits=4), saliency(stats), size // 10
    U, S, Vh = torch.linalg.svd((weight - coded.dense()) * importance, full_matrices=False)
    return coded, S[:rank, None] * Vh[:rank] / importance, U[:, :rank]


def draw(figure: Figure, rows: list[Row]) -> None:
    """Recipes on the left, solvers on the right, both axes by powers."""
    figure.set_size_inches(11, 4.5)
    for axes, kind in zip(figure.subplots(1, 2), ("recipe", "solver"), strict=True):
        for name in dict.fromkeys(row.name for row in rows if row.kind == kind):
            own = [row for row in rows if row.kind == kind and row.name == name]
            axes.plot([row.size for row in own], [row.seconds for row in own], "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("inputs and outputs of the layer")
        axes.set_ylabel("seconds")
        axes.set_title(f"one layer, by {kind}")
        axes.grid(alpha=0.3)
        axes.legend()


if __name__ == "__main__":
    study.run(main)
