"""`slimfx bench model`: its options and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from slimfx import bench_model, bench_model_gpu, cli_bench, show
from slimfx.bench_model import ModelRow
from slimfx.bench_model_gpu import GpuModelRow
from slimfx.errors import SlimError


def model(
    folder: Annotated[
        str | None, typer.Argument(help="Hugging Face folder. Default: a Llama shape.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Llama shape: tiny, 1b, 3b; on cuda tiny, 1b, 7b, 8b.")
    ] = "1b",
    tokens: Annotated[int, typer.Option(min=1, help="Steps to measure.")] = 16,
    batch: Annotated[int, typer.Option(min=2, help="Sequences of the batch.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, or cuda: batches of 1 and 16.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the rows as JSON.")
    ] = None,
    as_json: cli_bench.Json = False,
) -> None:
    """Tokens a second and memory of a whole model, floats beside compressed.

    Example: slimfx bench model --size 1b --threads 2
    """
    if device not in ("cpu", "cuda"):
        raise SlimError(f"device {device!r} is neither cpu nor cuda")
    if device == "cuda":
        if folder is not None:
            raise SlimError("bench model on cuda makes a model of a --size; leave the folder out")
        _on_cuda(size, output, as_json)
        return
    with show.line("model") as tell:
        found = bench_model.bench_model(
            folder, size=size, tokens=tokens, batch=batch, threads=threads, progress=tell
        )
        rows = cli_bench.collect(found, output)
    if as_json:
        typer.echo(cli_bench.record(rows))
        return
    Console().print(_table(rows, batch))


def _on_cuda(size: str, output: Path | None, as_json: bool) -> None:
    with show.line("model") as tell:
        found = bench_model_gpu.bench_model_gpu(size, progress=tell)
        rows = cli_bench.collect(found, output)
    if as_json:
        typer.echo(cli_bench.record(rows))
        return
    Console().print(gpu_table(rows))


def gpu_table(rows: list[GpuModelRow]) -> Table:
    """The rows, one line each, with what is to be said about them below."""
    notes = dict.fromkeys(f"{row.name}: {row.note}." for row in rows if row.note)
    notes["copy: read of weights in a second, of what a plain copy moves."] = None
    table = Table(
        *("weights", "batch", "tokens/s", "ms a step", "spread", "copy"),
        *("weights, MB", "allocated, MB", "left"),
        caption=" ".join(notes),
    )
    for row in rows:
        table.add_row(
            *(row.name, str(row.batch), f"{row.tokens_per_second:.1f} ({row.speedup:.2f}x)"),
            *(f"{1e3 * row.seconds:.3f}", f"{row.spread:.1%}", f"{row.share:.0%}"),
            *(f"{row.weight_bytes / 1e6:,.0f}", f"{row.allocated / 1e6:,.0f}", str(row.left)),
        )
    return table


def _table(rows: list[ModelRow], batch: int) -> Table:
    table = Table(
        "weights", "tokens/s", f"tokens/s, batch {batch}", "linears", "all", "process", "peak"
    )
    dense = rows[0]
    for row in rows:
        table.add_row(
            row.name,
            f"{row.one:.2f} ({row.one / dense.one:.2f}x)",
            f"{row.many:.1f} ({row.many / dense.many:.2f}x)",
            f"{row.linear_bytes / 1e6:,.0f} MB ({row.linear_bytes / dense.linear_bytes:.3f}x)",
            f"{row.weight_bytes / 1e6:,.0f} MB ({row.weight_bytes / dense.weight_bytes:.3f}x)",
            f"{row.resident / 1e6:,.0f} MB",
            f"{row.peak / 1e6:,.0f} MB",
        )
    return table
