"""What the programs of this folder share: their options, measuring a recipe, and the picture."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from slimfx.passes.inputs import tensor_inputs
from torch.export import ExportedProgram

import slimfx
from slimfx import show
from slimfx.cli_bench import collect, write_out
from slimfx.recipe import Calibration, Recipe
from slimfx.tasks import run_tasks

Case = tuple[str, float, Recipe]
"""Series, place on the x axis, recipe."""


@dataclass(frozen=True)
class Point:
    """One recipe on the model."""

    series: str
    x: float
    quality: float
    metric: str
    bits_per_weight: float
    """Of the compressed linears, counted to the byte."""
    cpu_seconds: float
    """Processor time of `compress`."""


@dataclass(frozen=True)
class Study:
    """A model, what calibrates and what evaluates it."""

    program: ExportedProgram
    data: Any
    text: Any
    sampling: Calibration
    samples: int
    tasks: tuple[str, ...]

    def quality(self, program: ExportedProgram) -> tuple[str, float]:
        """Perplexity; cosine of embeddings for an encoder; mean accuracy of tasks if there are."""
        if self.tasks:
            scores = run_tasks(program, self.tasks, limit=self.samples)
            found = [score.value for score in scores if score.metric == "acc"]
            return "accuracy", sum(found) / len(found)
        reads_text = list(tensor_inputs(self.program)) == ["input_ids"]
        dense = None if reads_text else self.program
        found = slimfx.evaluate(
            program, self.text, dense=dense, samples=self.samples, length=self.sampling.length
        )
        return found.metric, found.value

    def point(self, series: str, x: float, recipe: Recipe, data: Any = None) -> Point:
        """What a recipe costs and leaves; `data` instead of the study's own."""
        recipe = dataclasses.replace(recipe, calibration=self.sampling)
        began = time.process_time()
        small = slimfx.compress(self.program, recipe, data or self.data)
        seconds = time.process_time() - began
        bits = slimfx.plan(self.program, recipe).bits_per_weight
        metric, value = self.quality(small)
        return Point(series, x, value, metric, bits, seconds)

    def dense(self) -> Point:
        """The model as it is."""
        metric, value = self.quality(self.program)
        return Point("dense", 0.0, value, metric, 16.0, 0.0)

    def points(self, cases: Sequence[Case]) -> Iterable[Point]:
        """The dense model, then every case as soon as it is measured."""
        with show.line("reproduce") as tell:
            tell(0.0, "dense")
            yield self.dense()
            for i, (series, x, recipe) in enumerate(cases):
                tell((i + 1) / (len(cases) + 1), f"{series} {x:g}")
                yield self.point(series, x, recipe)


def options(text: str | None, presets: str = "") -> argparse.ArgumentParser:
    """Options of a program whose docstring is `text`; by default it measures `presets`."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--data", help="calibrate on this; default: Python's English")
    parser.add_argument("--text", help="evaluate on this; default: what calibration leaves out")
    parser.add_argument("--samples", type=int, default=48, help="windows to evaluate on")
    parser.add_argument("--calibration-samples", type=int, default=64, help="windows to calibrate")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--tasks", type=names, default=(), help="accuracy of lm-eval's tasks")
    parser.add_argument("--presets", type=names, default=names(presets), help="with commas")
    parser.add_argument("-o", "--output", type=Path, help="picture; its numbers go beside it")
    return parser


def names(text: str) -> tuple[str, ...]:
    """ "a,b" -> its parts."""
    return tuple(part for part in text.split(",") if part)


def numbers(text: str) -> tuple[float, ...]:
    """ "1,2.5" -> its numbers."""
    return tuple(map(float, names(text)))


def study_of(args: argparse.Namespace) -> Study:
    """The study that the options ask for."""
    sampling = Calibration(samples=args.calibration_samples, length=args.length)
    program = slimfx.capture(args.model)
    return Study(program, args.data, args.text, sampling, args.samples, args.tasks)


def finish(
    found: Iterable[Any], output: Path | None, draw: Callable[[Figure, list[Any]], None]
) -> list[Any]:
    """Print rows as they come, and write them and their picture where `output` is given."""
    rows = collect(found, output.with_suffix(".json") if output else None)
    table = Table(*(field.name for field in dataclasses.fields(rows[0])))
    for row in rows:
        values = dataclasses.astuple(row)
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)
    if output is not None:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure, rows)
        figure.savefig(output, dpi=150)
    return rows


def curves(xlabel: str, *, x: str = "x") -> Callable[[Figure, list[Any]], None]:
    """Quality against a field of the points, a line for each series, dense as a grey one."""

    def draw(figure: Figure, points: list[Point]) -> None:
        axes = figure.subplots()
        lines(axes, points, x)
        axes.set_xlabel(xlabel)

    return draw


def lines(axes: Any, points: list[Point], x: str = "x", style: str = "o-") -> None:
    """The lines of `curves`."""
    for series in dict.fromkeys(point.series for point in points):
        own = sorted((getattr(p, x), p.quality) for p in points if p.series == series)
        if series == "dense":
            axes.axhline(own[0][1], color="grey", linewidth=1, label="dense")
        else:
            axes.plot(*zip(*own), style, label=series)
    axes.set_ylabel(points[0].metric)
    if points[0].metric == "perplexity":
        axes.set_yscale("log")
        write_out(axes.yaxis)
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Run a program; an error of slimfx is one line."""
    try:
        main(sys.argv[1:])
    except slimfx.SlimError as error:
        sys.exit(f"slimfx: {error}")
