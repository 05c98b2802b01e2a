"""The `slimfx` command: one verb for each step, a table for people, `--json` for programs.

Exit codes: 0 done, 1 refused with one line on what and why, 2 wrong usage, 3 a check that failed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import slimfx
from slimfx import (
    cli_bench,
    cli_bench_kernels,
    cli_bench_model,
    cli_budget,
    cli_export,
    cli_finetune,
    cli_plan,
    cli_report,
    journal,
    ranks,
    show,
    tasks,
)
from slimfx.cli_arguments import names_in, program_of
from slimfx.errors import PlanError, SlimError
from slimfx.runtime import archive
from slimfx.runtime.manifest import Manifest, manifest_of
from slimfx.runtime.targets import pt2
from slimfx.runtime.unread import prepare_allocator
from slimfx.stepper import is_artifact

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Compress exported PyTorch programs to 2:4-sparse int4 weights plus low-rank adapters.",
)

cli_bench.app.command()(cli_bench_kernels.kernels)
cli_bench.app.command()(cli_bench_model.model)
app.add_typer(cli_bench.app, name="bench")
app.command()(cli_plan.plan)
app.command(epilog=cli_export.TARGET_TABLE)(cli_export.export)
app.command("import")(cli_export.import_checkpoint)
app.command()(cli_export.check)
app.command()(cli_finetune.finetune)
app.command("report")(cli_report.write_report)

Model = Annotated[str, typer.Argument(help="Hugging Face folder or hub name, or a .pt2 file.")]
Artifact = Annotated[Path, typer.Argument(help="A .pt2 file.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
BaseRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="a preset such as slim or joint-q, or a YAML file. Default: joint; with a budget "
        "joint-q, whose layouts and ranks are searched.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="Text, JSONL, dataset folder or name. Default: the English of the running Python.",
    ),
]
Form = Annotated[str, typer.Option(help="op (needs slimfx to run) or aten (needs only torch).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Samples = Annotated[int | None, typer.Option(help="Windows or documents at most.")]


@app.command()
def capture(
    model: Model,
    output: Output,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sequence the program takes.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache", help="Remember keys and values: one token a step.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Rows of the cache.")] = 1,
    as_json: Json = False,
) -> None:
    """Export a model to a .pt2 file.

    Example: slimfx capture examples/demo_lm -o dense.pt2 --kv-cache --max-length 512
    """
    pt2.check_target(output, "op")
    with show.line("capture") as tell:
        program = slimfx.capture(
            model, max_length=max_length, dtype=dtype, kv_cache=kv_cache, batch=batch
        )
        tell(0.6, f"write {output}")
        size = slimfx.save(program, output)
    show.values({"file": str(output), "bytes": size}, as_json)


@app.command()
def compress(
    model: Model,
    output: Output,
    recipe: BaseRecipe = None,
    data: Data = None,
    bits: cli_budget.Bits = None,
    target_size: cli_budget.TargetSize = None,
    max_loss: cli_budget.MaxLoss = None,
    target_latency: cli_budget.TargetLatency = None,
    text: cli_budget.Text = None,
    layouts: cli_budget.Layouts = None,
    form: Form = "op",
    as_json: Json = False,
) -> None:
    """Compress a model and write it with its report; the same command goes on where a killed one
    was.

    Example: slimfx compress examples/demo_lm -o small.pt2 --bits 3.4 --form aten
    On two processors: torchrun --nproc-per-node 2 -m slimfx compress ...
    """
    began = time.perf_counter()
    pt2.check_target(output, form)
    target = cli_budget.target_of(bits, target_size, max_loss, target_latency, recipe)
    read = is_artifact(model) or (target is not None and target.loss is not None)
    folder = output.with_name(f".{output.name}.journal")
    prepare_allocator()
    with ranks.joined() as mine:
        seen = mine.own == 0
        with show.line("search" if target else "compress", seen=seen) as tell:
            program = program_of(model) if read else slimfx.capture(model, weights="unread")
            chosen = cli_budget.recipe_for(
                *(program, recipe, data, target, mine), text=text, layouts=layouts, progress=tell
            )
        with journal.opened(folder, mine) as book, show.line("compress", seen=seen) as tell:
            planned = slimfx.plan(program, chosen)
            small = slimfx.compress(
                *(program, chosen, data),
                progress=lambda share, what: tell(0.1 + 0.7 * share, what),
                journal=book,
                ranks=mine,
            )
            if not seen:
                return
            tell(0.8, f"write {output}")
            size = slimfx.save(small, folder / output.name, form=form)
            archive.move(folder / output.name, output)
    result = {
        "file": str(output),
        "bytes": size,
        "bytes_planned": planned.file_bytes,
        "bytes_dense": planned.bytes_before,
        "bits_per_weight": planned.bits_per_weight,
        **cli_budget.planned_latency(program, chosen, target),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if not as_json:
        _layers(manifest_of(small))
    show.values(result, as_json)


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Text, JSONL, dataset folder or name[:configuration[:split]]; wikitext2 is the "
            "test text of the papers. Default: the English of the running Python.",
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The model before compression: compare embeddings by cosine.")
    ] = None,
    samples: Samples = None,
    length: Annotated[int, typer.Option(help="Tokens of a window or document.")] = 512,
    names: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            "-t",
            help="Tasks of lm-eval instead, with commas: continuation needs no data, zero-shot is "
            "mmlu,piqa,arc_easy,arc_challenge,winogrande,openbookqa.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task at most.")] = None,
    batch: Annotated[int, typer.Option(help="Rows at once, for tasks.")] = 8,
    as_json: Json = False,
) -> None:
    """Measure perplexity, with --dense the cosine to the dense model's embeddings, or --tasks.

    Example: slimfx eval small.pt2 --tasks continuation,piqa --limit 100
    """
    if names is not None and (data or dense or samples):
        raise typer.BadParameter("--tasks goes without --data, --dense and --samples")
    if names is None and limit is not None:
        raise typer.BadParameter("--limit is for --tasks; here it is --samples")
    with show.line("evaluate") as tell:
        program = program_of(model)
        if names is not None:
            chosen = names_in(names)
            scores = tasks.run_tasks(program, chosen, limit=limit, batch=batch, progress=tell)
        else:
            quality = slimfx.evaluate(
                program,
                tasks.wikitext2() if data == "wikitext2" else data,
                dense=program_of(dense) if dense else None,
                samples=samples,
                length=length,
                progress=tell,
            )
    if names is None:
        show.values(dataclasses.asdict(quality), as_json)
    elif as_json:
        show.values({"tasks": [dataclasses.asdict(score) for score in scores]}, True)
    else:
        _scores(scores)


def _scores(scores: Sequence[tasks.TaskScore]) -> None:
    table = Table("task", "metric", "value", "+-", "documents", "cut")
    for score in scores:
        error = "" if score.stderr is None else f"{score.stderr:.4f}"
        figures = (f"{score.value:.4f}", error, str(score.samples), str(score.cut or ""))
        table.add_row(score.task, score.metric, *figures)
    Console().print(table)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample within this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a text; tokens a second go to standard error.

    Example: slimfx generate small.pt2 "The function returns" --temperature 0.8
    """
    source = model if is_artifact(model) else program_of(model)
    pieces = slimfx.generate(
        *(source, prompt),
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
    )
    if as_json:
        text = "".join(pieces)
        show.values({"prompt": prompt, "text": text, **pieces.took.figures()}, True)
        return
    typer.echo(prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
    said = (f"{name.replace('_', ' ')}: {value}" for name, value in pieces.took.figures().items())
    typer.echo(", ".join(said), err=True)


@app.command()
def inspect(artifact: Artifact, as_json: Json = False) -> None:
    """Show what an artifact says of itself.

    Example: slimfx inspect small.pt2
    """
    manifest = pt2.read_manifest(artifact)
    if as_json:
        typer.echo(manifest.to_json())
        return
    _layers(manifest)
    show.values(
        {
            "file": str(artifact),
            "bytes": artifact.stat().st_size,
            "form": manifest.form,
            **{f"version of {k}": v for k, v in manifest.versions.items()},
            **{f"calibration {k}": v for k, v in manifest.calibration.items()},
            **{f"left as it is: {k}": v for k, v in manifest.skipped.items()},
        },
        False,
    )


def _layers(manifest: Manifest) -> None:
    table = show.layer_table(
        [row.name for row in manifest.layers],
        *("out x in", "layout", "rank", "bytes", "SNR dB", "without adapter"),
    )
    for row in manifest.layers:
        table.add_row(
            row.name,
            f"{row.out_features} x {row.in_features}",
            row.layout,
            str(row.rank or ""),
            show.size(row.bytes),
            f"{row.snr:.1f}",
            f"{row.snr_without_adapter:.1f}",
        )
    Console().print(table)
    for row in manifest.layers:
        for note in row.notes:
            typer.echo(f"{row.name}: {note}")


def main() -> None:
    """Run the command; an error of slimfx is one line on standard error and exit code 1."""
    _quiet()
    try:
        app()
    except SlimError as error:
        # a plan lists every problem, a line each; anything else is one line
        lines = str(error).splitlines() if isinstance(error, PlanError) else [_one_line(error)]
        for line in lines:
            typer.echo(f"slimfx: {line}", err=True)
        sys.exit(1)


def _one_line(error: SlimError) -> str:
    return " ".join(str(error).split())


def _quiet() -> None:
    """One progress line is ours; the libraries below keep theirs to themselves."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):  # what transformers imports where it is there
        logging.getLogger(name).setLevel(logging.ERROR)
