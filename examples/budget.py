"""Perplexity against bits a weight: what a search chooses, and one setting for all layers.

python examples/budget.py CALIBRATION TEXT [JSON [PICTURE [WINDOWS]]]: for each number of bits the
recipe of `slimfx compress --bits`, then each layout with the largest rank that fits (preset
joint-q). Rows are in the JSON as soon as they are measured; takes a quarter of an hour.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import slimfx
from slimfx import show
from slimfx.budget import Target, choose
from slimfx.candidates import LAYOUTS, candidates
from slimfx.cli_bench import record
from slimfx.recipe import Recipe

HERE = Path(__file__).parent
BITS = (3.8, 3.0, 3.4, 4.5)
LARGEST = 0.3
"""The rank of a uniform setting, as a share; above it another layout is always better."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe."""

    setting: str
    target: float
    bits_per_weight: float
    perplexity: float
    search_seconds: float
    """Processor time, as are those of `compress`."""
    compress_seconds: float


def uniform(dense, layout: str, bits: float) -> Recipe | None:  # type: ignore[no-untyped-def]
    """A layout with the largest adapters that fit into so many bits; None if none is near."""
    prune, width = LAYOUTS[layout]
    base, best = Recipe.preset("joint-q"), None
    quantize = dataclasses.replace(base.quantize, bits=width)
    for share in range(int(LARGEST * 1000) + 1):
        adapter = dataclasses.replace(base.adapter, rank=share / 1000) if share else None
        recipe = dataclasses.replace(base, prune=prune, quantize=quantize, adapter=adapter)
        found = slimfx.plan(dense, recipe).bits_per_weight
        if found > bits * 1.002:
            break
        best = recipe if found > 0.97 * bits else None
    return best


def main(
    calibration: str,
    text: str,
    output: str = "budget.json",
    picture: str = "",
    windows: str = "48",
) -> None:
    """Every row, and the picture."""
    samples = int(windows)
    dense, base = slimfx.capture(HERE / "demo_lm"), Recipe.preset("joint-q")
    rows = [Row("dense", 16, 16, slimfx.evaluate(dense, text, samples=samples).value, 0, 0)]
    with show.line("budget") as tell:
        began = time.process_time()
        found = candidates(dense, calibration, recipe=base, progress=tell)
        searched = time.process_time() - began
        jobs = [("search", b, choose(dense, Target(bits=b), base, found)) for b in BITS]
        jobs += [(name, b, uniform(dense, name, b)) for name in LAYOUTS for b in BITS]
        for i, (setting, bits, recipe) in enumerate(jobs):
            tell(i / len(jobs), f"{setting} {bits}")
            if recipe is None:
                continue
            size, began = slimfx.plan(dense, recipe).bits_per_weight, time.process_time()
            small = slimfx.compress(dense, recipe, calibration)
            spent = time.process_time() - began
            quality = slimfx.evaluate(small, text, samples=samples).value
            search = searched if setting == "search" else 0
            rows.append(Row(setting, bits, size, quality, search, spent))
            Path(output).write_text(record(rows) + "\n", encoding="utf-8")
    if picture:
        draw(rows, picture)


def draw(rows: list[Row], path: str) -> None:
    """A line for the search and each layout, the dense model as a line across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(rows[0].perplexity, color="grey", linewidth=1, label="dense")
    for setting in dict.fromkeys(row.setting for row in rows[1:]):
        points = sorted((r.bits_per_weight, r.perplexity) for r in rows if r.setting == setting)
        width = 2.5 if setting == "search" else 1
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=setting)
    axes.set_xlabel("bits a weight, scales and adapters included")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
