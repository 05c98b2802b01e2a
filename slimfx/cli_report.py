"""`slimfx report`: its options, the page it writes, and the line it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimfx import show
from slimfx.cli_arguments import names_in, program_of
from slimfx.errors import need
from slimfx.report import Measures, dense_report, report
from slimfx.report_page import page
from slimfx.runtime import archive

Artifacts = Annotated[
    list[Path], typer.Argument(help="A .pt2 file, or two to see side by side.", metavar="A [B]")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The page to write.")]
Text = Annotated[
    str | None,
    typer.Option(help="Held-out text: the perplexity on it, of encoders the cosine to --dense."),
]
Tasks = Annotated[str | None, typer.Option(help="Tasks of lm-eval, as slimfx eval takes them.")]
Dense = Annotated[
    str | None, typer.Option(help="The model before compression, a folder or .pt2, beside them.")
]


def write_report(
    artifacts: Artifacts,
    output: Output = Path("report.html"),
    text: Text = None,
    dense: Dense = None,
    samples: Annotated[
        int | None, typer.Option(help="Windows or documents of --text at most.")
    ] = None,
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task at most.")] = None,
    timed: Annotated[
        bool, typer.Option("--time", help="Time its linears on this CPU, beside floats; takes g++.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write a page of HTML on an artifact: sizes, layers, kernels, weights, recipe, golden check.

    Example: slimfx report small.pt2 --text valid.txt --dense examples/demo_lm
    """
    if len(artifacts) > 2:
        raise typer.BadParameter(f"{len(artifacts)} artifacts; a page has one, or two side by side")
    if limit is not None and tasks is None:
        raise typer.BadParameter("--limit is for --tasks; of --text it is --samples")
    chosen = names_in(tasks)
    if tasks is not None and not chosen:
        raise typer.BadParameter("--tasks names none; the one without data is continuation")
    if chosen:
        need("lm_eval")  # before the work, not after it
    measures = Measures(text, samples, chosen, limit)
    with show.line("report") as tell:
        steps = len(artifacts) + 1
        before = program_of(dense) if dense else None
        reports = []
        for i, path in enumerate(artifacts):
            tell(i / steps, path.name)
            reports.append(report(path, measures, dense=before, timed=timed))
        tell(len(artifacts) / steps, dense or f"write {output}")
        beside = dense_report(before, Path(dense).name, measures) if before and dense else None
        with archive.atomic(output) as temporary:
            written = page(reports, beside).encode()
            temporary.write_bytes(written)
    figures = {"file": str(output), "bytes": len(written)}
    for each in reports:
        figures[f"{each.name} answers as recorded"] = each.passed
    show.values(figures, as_json)
    if not all(each.passed for each in reports):
        raise typer.Exit(3)
