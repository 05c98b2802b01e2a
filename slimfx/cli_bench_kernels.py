"""`slimfx bench kernels`: its options, its table and its plot."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from slimfx import bench_gpu, bench_kernels, cli_bench, show
from slimfx.bench_contenders import FLOAT, OURS
from slimfx.bench_gpu import GpuRow
from slimfx.bench_kernels import KernelRow
from slimfx.errors import SlimError, need
from slimfx.runtime.archive import atomic


def kernels(
    shapes: Annotated[
        str, typer.Option(help="Models or KxN, with commas: llama-2-7b,4096x14336.")
    ] = "llama-2-7b",
    rows: Annotated[
        str | None,
        typer.Option(help="Rows of x, with commas. Default: 1,4,16,64,512; to 4096 on cuda."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: whole layers of models.")] = "cpu",
    budget: Annotated[
        float | None, typer.Option(min=1, help="On cuda: seconds after which no layer is begun.")
    ] = None,
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
    if plot is not None:
        need("matplotlib")  # before the work, not after it
    if device == "cuda":
        _on_cuda(shapes, rows, budget, output, plot, as_json)
        return
    if device != "cpu":
        raise SlimError(f"device {device!r} is neither cpu nor cuda")
    chosen, counts = bench_kernels.shapes(shapes), _counts(rows or "1,4,16,64,512")
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


def _on_cuda(
    models: str,
    rows: str | None,
    budget: float | None,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Whole layers of models on the GPU."""
    bench_gpu.check_device("cuda")
    layers, counts = bench_gpu.layers(models), _counts(rows or ",".join(map(str, bench_gpu.ROWS)))
    with show.line("kernels") as tell:
        tell(0.0, "compile")
        bench_gpu.compile_in_parallel(layers, counts, max(1, min(8, (os.cpu_count() or 2) // 2)))
        measured = bench_gpu.bench_gpu(layers, counts, budget=budget, progress=tell)
        found = cli_bench.collect(measured, output)
    if plot is not None:
        _draw(found, plot, base="bfloat16", ours=("slim", "slim lora"))
    if as_json:
        typer.echo(cli_bench.record(found))
    else:
        Console().print(gpu_table(found))
    failed = [row for row in found if row.note.startswith(bench_gpu.FAILED)]
    if failed:
        raise SlimError(
            f"{failed[0].name} on {failed[0].layer}, M={failed[0].M}: {failed[0].note} "
            f"({len(failed)} of {len(found)} rows)"
        )


def gpu_table(rows: Sequence[GpuRow]) -> Table:
    """For each layer and M the microseconds and, under them, the speed over bfloat16; under ours
    also the share of a plain copy's GB/s and the kernel.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    table = Table(box=box.SIMPLE_HEAD, padding=0, caption=_gpu_note(rows))
    table.add_column("layer KxN", no_wrap=True)
    for name in ("M", *names):
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for layer, M in dict.fromkeys((row.layer, row.M) for row in rows if row.M):
        here = {row.name: row for row in rows if (row.layer, row.M) == (layer, M)}
        table.add_row(layer, str(M), *(_gpu_cell(here[name]) for name in names))
    return table


def _gpu_cell(row: GpuRow) -> str:
    if row.seconds is None:
        return "-"
    lines = [f"{1e6 * row.seconds:.3g} us", f"{row.speedup:.3g}x" if row.speedup else "-"]
    if row.kernel:
        lines += [f"{row.share:.0%}", row.kernel]
    return "\n".join(lines)


def _gpu_note(rows: Sequence[GpuRow]) -> str:
    ceiling = max((row.ceiling or 0.0 for row in rows), default=0.0)
    slower = [
        f"{r.layer} M={r.M} {r.name}" for r in rows if r.note.startswith("slower") and r.kernel
    ]
    others = dict.fromkeys(
        f"{row.name}: {row.note}" for row in rows if row.note and not row.note.startswith("slower")
    )
    return (
        "Microseconds of the median CUDA graph replay and bfloat16's divided by them; under ours "
        f"the share of a plain copy, which has {ceiling:.0f} GB/s. Slower than bfloat16: "
        + (", ".join(slower) or "none of ours")
        + "."
        + "".join(f" {each}." for each in others)
    )


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
    if row.name != FLOAT and row.speedup is not None:
        lines.append(f"{row.speedup:.3g}x" if row.speedup >= 1 else f"{row.speedup:.2f}x")
    if row.name in OURS:
        lines += [f"{row.gb_per_second:.3g}", f"{row.share:.0%}"]
    return "\n".join(lines)


def _draw(
    rows: Sequence[KernelRow] | Sequence[GpuRow],
    path: Path,
    *,
    base: str = FLOAT,
    ours: Sequence[str] = OURS,
) -> None:
    """Speed over floats against M, a panel for each shape and a line for each contender."""
    matplotlib = need("matplotlib.figure")
    shapes = list(dict.fromkeys(_place(row) for row in rows if row.seconds))
    columns = min(3, len(shapes))
    lines = math.ceil(len(shapes) / columns)
    figure = matplotlib.Figure(figsize=(4.5 * columns, 4 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, shape in zip(panels, shapes, strict=False):
        here = [row for row in rows if _place(row) == shape and row.speedup]
        for name in dict.fromkeys(row.name for row in here):
            points = [(row.M, row.speedup) for row in here if row.name == name]
            width = 2.5 if name in ours else 1
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
    panels[0].set_ylabel(f"speed over {base}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=9)
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=150)


def _place(row: KernelRow | GpuRow) -> str:
    return row.shape if isinstance(row, KernelRow) else row.layer
