"""`slimfx finetune`: its options, its checkpoints, and what it prints."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from torch.export import ExportedProgram

import slimfx
from slimfx import show
from slimfx.finetune import is_first
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.targets import pt2
from slimfx.training_text import Training

_DEFAULT = Training()


Artifact = Annotated[Path, typer.Argument(help="A .pt2 file of form op with adapters.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
Data = Annotated[
    str | None,
    typer.Option(
        *("--data", "-d"),
        help="Text, JSONL, dataset folder or name. Default: the English of the running Python.",
    ),
]
Accumulate = Annotated[int, typer.Option(help="Windows whose gradients make one step.")]
Rate = Annotated[
    float, typer.Option(help="Largest relative change of an adapter in the first step.")
]
Teacher = Annotated[
    str | None, typer.Option(help="The dense model to learn from, a folder or .pt2 file.")
]
Text = Annotated[
    str | None, typer.Option(help="Held-out text: its perplexity is measured before and after.")
]
SaveEvery = Annotated[
    int, typer.Option(help="Steps between checkpoints, which are in OUTPUT.checkpoints.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
]


def finetune(
    artifact: Artifact,
    output: Output,
    data: Data = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = _DEFAULT.tokens,
    seq: Annotated[int, typer.Option(help="Tokens of a window.")] = _DEFAULT.length,
    accumulate: Accumulate = _DEFAULT.accumulate,
    rate: Rate = _DEFAULT.rate,
    seed: Annotated[int, typer.Option(help="Of the order of the windows.")] = _DEFAULT.seed,
    teacher: Teacher = None,
    text: Text = None,
    samples: Annotated[int | None, typer.Option(help="Windows of --text at most.")] = None,
    save_every: SaveEvery = _DEFAULT.save_every,
    resume: Resume = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train the adapters of a compressed program on text; everything else stays to the bit.

    Example: slimfx finetune small.pt2 --data train.txt --text valid.txt -o tuned.pt2
    On two processors: torchrun --nproc-per-node 2 -m slimfx finetune ...
    """
    began = time.perf_counter()
    pt2.check_target(output, "op")
    how = Training(tokens, seq, accumulate, rate, seed, save_every)
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    with show.line("finetune", seen=is_first()) as tell:
        program = slimfx.load(artifact)
        before = _perplexity(program, text, samples) if is_first() else None
        tuned = slimfx.finetune(
            *(program, data),
            how=how,
            teacher=teacher,
            checkpoints=checkpoints,
            resume=resume,
            progress=lambda share, what: tell(0.05 + 0.85 * share, what),
        )
        if not is_first():
            return
        tell(0.9, "measure")
        after = _perplexity(tuned, text, samples)
        tell(0.95, f"write {output}")
        size = slimfx.save(tuned, output)
    shutil.rmtree(checkpoints)
    done: Any = manifest_of(tuned).calibration["finetune"]
    figures = {name: done[name] for name in ("steps", "loss_first", "loss_last")}
    if text is not None:
        figures |= {"perplexity_before": before, "perplexity_after": after}
    seconds = round(time.perf_counter() - began, 1)
    show.values({"file": str(output), "bytes": size, **figures, "seconds": seconds}, as_json)


def _perplexity(program: ExportedProgram, text: str | None, samples: int | None) -> float | None:
    if text is None:
        return None
    return slimfx.evaluate(program, text, samples=samples).value
