"""`slimfx report`: its options, the page it writes, and the line it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import slimfx
from slimfx import show
from slimfx.report import Report, dense_report, report
from slimfx.report_page import page
from slimfx.runtime import archive
from slimfx.stepper import is_artifact

Artifacts = Annotated[
    list[Path], typer.Argument(help="A .pt2 file, or two to see side by side.", metavar="A [B]")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The page to write.")]
Text = Annotated[str | None, typer.Option(help="Held-out text: the perplexity on it is measured.")]
Dense = Annotated[
    str | None, typer.Option(help="The model before compression, a folder or .pt2, beside them.")
]


def write_report(
    artifacts: Artifacts,
    output: Output = Path("report.html"),
    text: Text = None,
    dense: Dense = None,
    samples: Annotated[int | None, typer.Option(help="Windows of --text at most.")] = None,
    timed: Annotated[
        bool, typer.Option("--time", help="Time its linears on this CPU, beside floats.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write a page of HTML on an artifact: sizes, layers, kernels, weights, recipe, golden check.

    Example: slimfx report small.pt2 --text valid.txt --dense examples/demo_lm
    """
    if len(artifacts) > 2:
        raise typer.BadParameter(f"{len(artifacts)} artifacts; a page has one, or two side by side")
    with show.line("report") as tell:
        reports = []
        for i, path in enumerate(artifacts):
            tell(i / (len(artifacts) + 1), path.name)
            reports.append(report(path, text=text, samples=samples, timed=timed))
        tell(len(artifacts) / (len(artifacts) + 1), dense or f"write {output}")
        before = _dense(dense, text, samples) if dense else None
        with archive.atomic(output) as temporary:
            written = page(reports, before).encode()
            temporary.write_bytes(written)
    figures = {"file": str(output), "bytes": len(written)}
    for each in reports:
        figures[f"{each.name} answers as recorded"] = each.passed
    show.values(figures, as_json)
    if not all(each.passed for each in reports):
        raise typer.Exit(3)


def _dense(model: str, text: str | None, samples: int | None) -> Report:
    program = slimfx.load(model) if is_artifact(model) else slimfx.capture(model)
    return dense_report(program, Path(model).name, text=text, samples=samples)
