"""`slimfx bench`: measure on this machine what the README says of another."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

import slimfx
from slimfx import bench_methods, bench_solver, show
from slimfx.cli_arguments import names_in, program_of
from slimfx.errors import need
from slimfx.recipe import Calibration
from slimfx.runtime.archive import atomic

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Tables of methods and solvers, measured on this machine.",
)
Row = TypeVar("Row")
"""Of any table."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def methods(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name, or a .pt2 file.")],
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="What to calibrate on. Default: Python's English."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="What to evaluate on. Default: the part that calibration leaves out."),
    ] = None,
    only: Annotated[str, typer.Option(help="Presets to measure, with commas. Default: all.")] = "",
    samples: Annotated[int, typer.Option(help="Windows or documents to evaluate on.")] = 48,
    calibration_samples: Annotated[
        int, typer.Option(help="Windows or documents to calibrate.")
    ] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a window or document.")] = 512,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the rows as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw quality against bits a weight (.png, .svg).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Every method of the paper on one model: quality, bits, memory, FLOPs, seconds.

    Example: slimfx bench methods examples/demo_lm --only wanda,slim,joint
    """
    chosen = names_in(only)
    for name in chosen:
        slimfx.Recipe.preset(name)
    if plot is not None:
        need("matplotlib")  # before the work, not after it
    program = program_of(model)
    with show.line("bench") as tell:
        found = bench_methods.bench_methods(
            program,
            data,
            text,
            only=chosen,
            sampling=Calibration(samples=calibration_samples, length=length),
            samples=samples,
            progress=tell,
        )
        rows = collect(found, output)
    if plot is not None:
        _draw(rows, plot)
    if as_json:
        typer.echo(record(rows))
        return
    Console().print(methods_table(rows))


def collect(rows: Iterable[Row], output: Path | None) -> list[Row]:
    """All rows; those that are there are in `output`, if a file is named, should the rest fail."""
    found: list[Row] = []
    for row in rows:
        found.append(row)
        if output is not None:
            with atomic(output) as temporary:
                temporary.write_text(record(found) + "\n", encoding="utf-8")
    return found


def record(rows: Sequence[Any]) -> str:
    """Rows of a table as JSON, with what they were measured on and by."""
    about: dict[str, Any] = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"slimfx": version("slimfx"), "torch": torch.__version__},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        about["versions"] |= {"triton": version("triton"), "cuda": torch.version.cuda}
        about["gpu"] = torch.cuda.get_device_name()
    return json.dumps({**about, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)


def methods_table(rows: list[bench_methods.Row]) -> Table:
    """The rows, one line each."""
    table = Table()
    table.add_column("method", no_wrap=True)
    for name in (
        "sparse",
        "values",
        rows[0].metric,
        "bits",
        "memory",
        "FLOPs",
        "seconds",
        "CPU s",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            row.pattern,
            row.values,
            f"{row.quality:.4g}",
            f"{row.bits_per_weight:.2f}",
            f"{row.memory:.2f}x",
            f"{row.flops:.2f}x",
            f"{row.seconds:.1f}" if row.seconds else "",
            f"{row.cpu_seconds:.1f}" if row.seconds else "",
        )
    return table


def _draw(rows: list[bench_methods.Row], path: Path) -> None:
    """Quality against stored bits, a colour for each pattern, with the dense model as a line."""
    matplotlib = need("matplotlib.figure")
    figure = matplotlib.Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    dense, *others = rows
    axes.axhline(dense.quality, color="grey", linewidth=1, label="dense, 16 bits")
    for pattern in bench_methods.PATTERNS:
        points = [row for row in others if row.pattern == pattern]
        label = "not pruned" if pattern == "-" else f"{pattern} sparse"
        axes.scatter(
            [row.bits_per_weight for row in points], [row.quality for row in points], label=label
        )
        for row in points:
            place = (row.bits_per_weight, row.quality)
            axes.annotate(row.method, place, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel("bits a weight, scales and adapters included")
    axes.set_ylabel(dense.metric)
    if dense.metric == "perplexity":
        axes.set_yscale("log")
        write_out(axes.yaxis)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)


def write_out(axis: Any) -> None:
    """Write the numbers of a logarithmic axis as they are, not as powers of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


@app.command()
def solver(
    size: Annotated[int, typer.Option(help="Rows and columns of the layer.")] = 4096,
    rank: Annotated[int | None, typer.Option(help="Of the adapter. Default: a tenth.")] = None,
    as_json: Json = False,
) -> None:
    """How long the adapter of one layer takes, beside torch's own decomposition.

    Example: slimfx bench solver --size 1024
    """
    with show.line("solver") as tell:
        rows = bench_solver.bench_solver(size, rank, progress=tell)
    if as_json:
        typer.echo(record(rows))
        return
    found = [dataclasses.asdict(row) for row in rows]
    table = Table(*found[0])
    for row in found:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
