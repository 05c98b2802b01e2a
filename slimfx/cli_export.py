"""`slimfx export` and `slimfx check`: their options and tables."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import slimfx
from slimfx import show
from slimfx.check import Checked, measure
from slimfx.export import TARGETS
from slimfx.runtime.targets import pt2

_WRITES = {"pt2": "-aten.pt2", "aoti": "-aoti.pt2", "pte": ".pte", "onnx": ".onnx", "hf": "-hf"}


def _target_table() -> str:
    """The targets, for the end of `slimfx export --help`."""
    columns = ("target", "size", "needs to run", "inputs of compressed linears")
    table = Table(*columns, box=None, pad_edge=False)
    for name, target in TARGETS.items():
        table.add_row(name, f"{target.size:.2f}x", target.needs, target.inputs)
    text = StringIO()
    Console(file=text, width=76, color_system=None).print(table)
    size = "size: all files of examples/demo_lm, relative to its .pt2 of form op"
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\b\n" + "\n".join([*lines, size])  # \b: as it is, not wrapped


TARGET_TABLE = _target_table()


def export(
    artifact: Annotated[Path, typer.Argument(help="A .pt2 file of form op.")],
    target: Annotated[str, typer.Option("--to", help=f"{', '.join(TARGETS)}.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Default: beside the artifact, with its name."),
    ] = None,
    march: Annotated[
        str | None,
        typer.Option(help="aoti: native (default), x86-64-v3 (AVX2) or x86-64-v4 (AVX-512)."),
    ] = None,
    accuracy: Annotated[
        str | None, typer.Option(help="aoti, pte, onnx: exact or int8-activations.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="hf: bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="aoti: cpu (default) or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write a compressed program for a place that deploys it.

    Example: slimfx export small.pt2 --to aoti
    """
    output = output or artifact.with_name(f"{artifact.stem}{_WRITES.get(target, '')}")
    with show.line("export") as tell:
        program = slimfx.load(artifact)
        tell(0.1, f"write {output}")
        options = {"march": march, "accuracy": accuracy, "dtype": dtype, "device": device}
        written = slimfx.export(program, target, output, **options)
    if as_json:
        typer.echo(json.dumps({"file": str(output), **dataclasses.asdict(written)}, indent=1))
        return
    kernels = f", {written.linears} compressed linears in {written.kernels} kernel calls"
    typer.echo(f"{output}: {show.size(written.bytes)}{kernels if written.kernels else ''}")
    for note in written.notes:
        typer.echo(note)


def import_checkpoint(
    folder: Annotated[Path, typer.Argument(help="compressed-tensors, GPTQ or SLiM weights.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .pt2 file to write.")],
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT LoRA folder. Default: FOLDER/adapter, if any.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence the program takes.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Read a compressed Hugging Face folder of another library into a .pt2 file of form op.

    Example: slimfx import small-hf -o again.pt2
    """
    pt2.check_target(output, "op")
    with show.line("import") as tell:
        program = slimfx.import_checkpoint(folder, adapter=adapter, max_length=max_length)
        tell(0.7, f"write {output}")
        size = slimfx.save(program, output)
    show.values({"file": str(output), "bytes": size}, as_json)


def check(
    artifacts: Annotated[list[Path], typer.Argument(help="Files or folders that slimfx wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Run artifacts on their recorded inputs and compare with their recorded outputs.

    Example: slimfx check small.pt2 small.onnx small-hf
    """
    found = []
    with show.line("check") as tell:
        for i, artifact in enumerate(artifacts):
            tell(i / len(artifacts), str(artifact))
            found.append(measure(artifact))
    rows = [_row(artifact, checked) for artifact, checked in zip(artifacts, found, strict=True)]
    if as_json:
        typer.echo(json.dumps(rows[0] if len(rows) == 1 else rows, indent=1))
    else:
        Console().print(_table(artifacts, found))
    if not all(checked.result.passed for checked in found):
        raise typer.Exit(3)


def _row(artifact: Path, checked: Checked) -> dict[str, object]:
    fields = dataclasses.asdict(checked)
    return {
        "file": str(artifact),
        **fields.pop("result"),
        "passed": checked.result.passed,
        **fields,
    }


def _table(artifacts: list[Path], found: list[Checked]) -> Table:
    table = Table("file", "target", "bytes", "difference", "tokens/s", "needs", box=box.SIMPLE)
    for artifact, checked in zip(artifacts, found, strict=True):
        result, speed = checked.result, checked.tokens_per_second
        gap = "0" if result.identical else f"{result.max_difference:.1e}"
        table.add_row(
            str(artifact),
            checked.target,
            show.size(checked.bytes),
            f"{gap} ({'within' if result.passed else 'ABOVE'} {result.tolerance:.0e})",
            "" if speed is None else f"{speed:.1f}",
            checked.needs,
        )
    return table
