"""The paper's tables of memory and FLOPs (19 and 20), for any configuration; no weight is read.

python examples/reproduce/cost.py MODEL ... -o cost.png

Memory over every tensor, FLOPs over the linears, as shares of the model in 16 bits (equations 12
and 13 of the paper, arXiv 2410.09615).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import study
from matplotlib.figure import Figure

import slimfx
from slimfx.bench_methods import flops_share, memory_share
from slimfx.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One model under one recipe."""

    model: str
    recipe: str
    bits_per_weight: float
    memory: float
    flops: float


def main(words: Sequence[str]) -> list[Row]:
    """A row for each model and preset."""
    parser = study.options(__doc__, "sparsegpt,wanda,l2qer,naive-lora,slim,slim-q,joint,joint-q")
    parser.add_argument("more", nargs="*", help="other models")
    args = parser.parse_args(words)
    found = _rows((args.model, *args.more), args.presets)
    return study.finish(found, args.output, draw)


def _rows(folders: Sequence[str], presets: Sequence[str]) -> Iterator[Row]:
    for folder in folders:
        program = slimfx.capture(folder, weights=False)
        for preset in presets:
            recipe = Recipe.preset(preset)
            planned = slimfx.plan(program, recipe)
            shares = (memory_share(planned), flops_share(planned, recipe))
            yield Row(Path(folder).name, preset, planned.bits_per_weight, *shares)


def draw(figure: Figure, rows: list[Row]) -> None:
    """Memory and FLOPs side by side, for each model and recipe."""
    figure.set_size_inches(7, 1.5 + 0.35 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh([y - 0.2 for y in places], [row.memory for row in rows], 0.4, label="memory")
    axes.barh([y + 0.2 for y in places], [row.flops for row in rows], 0.4, label="FLOPs")
    axes.set_yticks(places, [f"{row.model}, {row.recipe}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of the model in 16 bits")
    axes.legend()


if __name__ == "__main__":
    study.run(main)
