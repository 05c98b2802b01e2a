"""`slimfx plan`: its options and its table."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

import typer
from rich.console import Console

import slimfx
from slimfx import seconds, show
from slimfx.cli_arguments import program_of
from slimfx.runtime.unread import prepare_allocator

Model = Annotated[str, typer.Argument(help="Hugging Face folder or hub name, or a .pt2 file.")]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="a preset such as slim or joint-q, or a YAML file.")
]
Timed = Annotated[
    bool, typer.Option("--time", help="Measure this machine for a minute: seconds, too.")
]
Processes = Annotated[int, typer.Option(help="Of torchrun, for --time.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def plan(
    model: Model,
    recipe: RecipeOption = "joint",
    timed: Timed = False,
    processes: Processes = 1,
    as_json: Json = False,
) -> None:
    """Show what a recipe will do to each linear, what the file will weigh, what it will take.

    Of a model folder only config.json is read.

    Example: slimfx plan examples/demo_lm --recipe slim-q --time
    """
    prepare_allocator()  # as compress does, whose time is measured
    began = time.perf_counter()
    with show.line("plan"):
        program = program_of(model, weights=False)
        captured = time.perf_counter() - began
        planned = slimfx.plan(program, recipe)
        took = seconds.predict(program, recipe, processes) if timed else None
    totals = {
        name: getattr(planned, name)
        for name in ("bytes_before", "bytes_after", "file_bytes", "bits_per_weight", "peak_memory")
    }
    if took is not None:
        parts = {"capture": captured, **dataclasses.asdict(took), "all": captured + took.total}
        totals |= {f"seconds_{name}": round(value, 1) for name, value in parts.items()}
    if as_json:
        show.values({"layers": [dataclasses.asdict(row) for row in planned.rows], **totals}, True)
        return
    table = show.layer_table(
        [row.name for row in planned.rows],
        "out x in",
        "layout",
        "rank",
        "method",
        "before",
        "after",
    )
    for row in planned.rows:
        table.add_row(
            row.name,
            f"{row.out_features} x {row.in_features}",
            row.layout,
            str(row.rank or ""),
            row.skipped or row.method,
            show.size(row.bytes_before),
            show.size(row.bytes_after),
        )
    Console().print(table)
    show.values(totals, False)
