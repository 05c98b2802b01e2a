"""What the commands print: one progress line, tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich import progress as bar
from rich.console import Console
from rich.table import Table


@contextmanager
def line(what: str, *, seen: bool = True) -> Iterator[Callable[[float, str], None]]:
    """One progress line for the whole command, with the time that is left, on standard error."""
    with bar.Progress(
        bar.TextColumn("{task.description}"),
        bar.BarColumn(),
        bar.TaskProgressColumn(),
        bar.TextColumn("left"),
        bar.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not seen,
    ) as shown:
        task = shown.add_task(what, total=1.0)
        yield lambda share, part: shown.update(task, completed=share, description=f"{what} {part}")


def layer_table(names: list[str], *columns: str) -> Table:
    """A table whose first column shows layer names in full, however narrow the screen."""
    made = Table()
    made.add_column("layer", no_wrap=True, min_width=max(map(len, names), default=0))
    for column in columns:
        made.add_column(column)
    return made


def values(figures: dict[str, Any], as_json: bool) -> None:
    """Named figures as a small table, or as JSON."""
    if as_json:
        typer.echo(json.dumps(figures, indent=1))
        return
    made = Table(show_header=False, box=None)
    for name, value in figures.items():
        if isinstance(value, float):
            text = f"{value:.4g}"
        else:
            text = size(value) if "bytes" in name or "memory" in name else str(value)
        made.add_row(name.replace("_", " "), text)
    Console().print(made)


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e6:,.3f} MB" if count >= 100_000 else f"{count:,} B"
