"""`slimfx bench kernels`: its options, its table and its plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from slimfx import bench_kernels, cli_bench, show
from slimfx.bench_contenders import FLOAT, OURS
from slimfx.bench_kernels import KernelRow
from slimfx.errors import SlimError, need
from slimfx.runtime.archive import atomic


def kernels(
    shapes: Annotated[
        str, typer.Option(help="Models or KxN, with commas: llama-2-7b,4096x14336.")
    ] = "llama-2-7b",
    rows: Annotated[str, typer.Option(help="Rows of x, with commas.")] = "1,4,16,64,512",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the rows as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the speedup over float32 (.png, .svg).")
    ] = None,
    as_json: cli_bench.Json = False,
) -> None:
    """One linear in our kernels, in floats and in the int4 of torch and ONNX Runtime.

    Example: slimfx bench kernels --shapes 4096x4096 --rows 1,16
    """
    chosen, counts = bench_kernels.shapes(shapes), _counts(rows)
    if plot is not None:
        need("matplotlib")  # before the work, not after it
    if threads is not None:
        torch.set_num_threads(threads)
    with show.line("kernels") as tell:
        measured = bench_kernels.bench_kernels(chosen, counts, progress=tell)
        found = cli_bench.collect(measured, output)
    if plot is not None:
        _draw(found, plot)
    if as_json:
        typer.echo(cli_bench.record(found))
        return
    Console().print(kernels_table(found))


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise SlimError(f"rows {text!r} are not whole numbers above 0 with commas between them")
    return list(dict.fromkeys(map(int, parts)))


def kernels_table(rows: Sequence[KernelRow]) -> Table:
    """For each shape and M the milliseconds and, under them, the speed over float32; under ours
    also GB/s of weights and the share of a plain read.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    table = Table(box=box.SIMPLE_HEAD, padding=0, caption=_note(rows))
    table.add_column("KxN", no_wrap=True)
    for name in ("M", *names):
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for shape, M in dict.fromkeys((row.shape, row.M) for row in rows):
        here = {row.name: row for row in rows if (row.shape, row.M) == (shape, M)}
        table.add_row(shape, str(M), *(_cell(here[name]) for name in names))
    return table


def _note(rows: Sequence[KernelRow]) -> str:
    noise = max(row.seconds / row.fastest for row in rows if row.seconds and row.fastest)
    ceiling = max(row.ceiling for row in rows if row.ceiling)
    missing = dict.fromkeys(f"{row.name}: {row.note}" for row in rows if row.note)
    return (
        f"Milliseconds of the median call on {torch.get_num_threads()} thread(s), and float32's "
        f"divided by them; under ours GB/s of weights and the share of a plain read, which has "
        f"{ceiling:.1f} GB/s. Medians are up to {noise:.1f} times the fastest call: the less, the "
        f"quieter the machine." + "".join(f" {each}." for each in missing)
    )


def _cell(row: KernelRow) -> str:
    if row.seconds is None:
        return "-"
    time = 1e3 * row.seconds
    lines = [f"{time:.3g}" if time < 1000 else f"{time:.0f}"]
    if row.name != FLOAT:
        lines.append(f"{row.speedup:.3g}x")
    if row.name in OURS:
        lines += [f"{row.gb_per_second:.3g}", f"{row.share:.0%}"]
    return "\n".join(lines)


def _draw(rows: Sequence[KernelRow], path: Path) -> None:
    """Speed over float32 against M, a panel for each shape and a line for each contender."""
    matplotlib = need("matplotlib.figure")
    shapes = list(dict.fromkeys(row.shape for row in rows))
    columns = min(3, len(shapes))
    lines = math.ceil(len(shapes) / columns)
    figure = matplotlib.Figure(figsize=(4.5 * columns, 4 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, shape in zip(panels, shapes, strict=False):
        here = [row for row in rows if row.shape == shape and row.speedup]
        for name in dict.fromkeys(row.name for row in here):
            points = [(row.M, row.speedup) for row in here if row.name == name]
            width = 2.5 if name in OURS else 1
            axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sorted({row.M for row in here})
        axes.set_xticks(ticks, [str(M) for M in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.set_title(shape)
        axes.set_xlabel("rows of x")
        axes.grid(alpha=0.3)
    for axes in panels[len(shapes) :]:
        axes.remove()
    panels[0].set_ylabel("speed over float32")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=9)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)
