"""`slimfx bench model`: its options and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from slimfx import bench_model, cli_bench, show
from slimfx.bench_model import ModelRow


def model(
    folder: Annotated[
        str | None, typer.Argument(help="Hugging Face folder. Default: a Llama shape.")
    ] = None,
    size: Annotated[str, typer.Option(help="Llama shape: tiny, 1b or 3b.")] = "1b",
    tokens: Annotated[int, typer.Option(min=1, help="Steps to measure.")] = 16,
    batch: Annotated[int, typer.Option(min=2, help="Sequences of the batch.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the rows as JSON.")
    ] = None,
    as_json: cli_bench.Json = False,
) -> None:
    """Tokens a second and memory of a whole model, floats beside compressed.

    Example: slimfx bench model --size 1b --threads 2
    """
    with show.line("model") as tell:
        found = bench_model.bench_model(
            folder, size=size, tokens=tokens, batch=batch, threads=threads, progress=tell
        )
        rows = cli_bench.collect(found, output)
    if as_json:
        typer.echo(cli_bench.record(rows))
        return
    Console().print(_table(rows, batch))


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
