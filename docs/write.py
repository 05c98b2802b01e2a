"""Write the parts of these pages that come from the sources and from measurements.

python docs/write.py        # tests/docs/test_written.py compares

A part lies between <!-- written: NAME --> and <!-- end -->; NAME is one of `PARTS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from slimfx.runtime.select import Form, Gpu, Layer, stretches
from torch import nn

import slimfx
from slimfx.cli import app
from slimfx.export import TARGETS
from slimfx.recipe import PRESETS

HERE = Path(__file__).parent
RESULTS = HERE.parent / "examples" / "results"
PART = re.compile(r"(<!-- written: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
GPUS = {
    "NVIDIA, sm_90": Gpu("cuda", 90),
    "NVIDIA, sm_80 and others since": Gpu("cuda", 80),
    "NVIDIA, older": Gpu("cuda", 75),
    "AMD": Gpu("hip", "gfx942"),
}
WEIGHTS = {
    "2:4 int4": Form("2:4", 4, 128),
    "dense int4": Form("dense", 4, 128),
    "bitmask int4": Form("bitmask", 4, 128),
    "dense int8": Form("dense", 8, 128),
    "2:4 bfloat16": Form("2:4", 16, 0),
}
ROWS = 4096
"""Of x: the last that the table of kernels tells of."""


def table(columns: Sequence[str], rows: Iterator[Sequence[Any]] | Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def commands() -> str:
    """Every command with its options, as `--help` has them."""
    return "\n".join(_command(name, command) for name, command in leaves())


def leaves() -> Iterator[tuple[str, Any]]:
    """ "compress", "bench kernels", ... with the command each one is."""
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {part}", leaf) for part, leaf in sorted(inner.items()))


def _command(name: str, command: Any) -> str:
    what, example, more = told(command)
    rows = []
    for parameter in command.params:
        if "--help" in parameter.opts:
            continue
        option = ", ".join(f"`{each}`" for each in parameter.opts)
        if not parameter.opts[0].startswith("-"):
            option = f"`{parameter.name.upper()}`"
        rows.append((option, _default(parameter), parameter.help or ""))
    text = f"## slimfx {name}\n\n{what}\n\nFor instance `{example}`\n{more}\n"
    return text + table(("", "default", "what it is"), rows)


def told(command: Any) -> tuple[str, str, str]:
    """What a command does, its example, and what is said behind that."""
    what, _, rest = command.help.partition("Example: ")
    example, _, more = rest.partition("\n")
    return what.strip(), example.strip(), more and f"\n{more.strip()}\n"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False, "") else f"`{parameter.default}`"


def presets() -> str:
    """What each preset makes of a linear of 4096 inputs and outputs."""
    with torch.device("meta"):
        program = slimfx.capture(nn.Linear(4096, 4096), (torch.zeros(2, 4096),))
    rows = []
    for name in PRESETS:
        planned = slimfx.plan(program, name)
        (row,) = planned.rows
        bits = f"{planned.bits_per_weight:.2f}"
        rows.append((f"`{name}`", row.method, row.layout, row.rank or "", bits))
    return table(("preset", "steps", "layout", "rank", "bits a weight"), rows)


def targets() -> str:
    """The targets of `slimfx export`."""
    rows = [
        (f"`{name}`", target.ending or "folder", f"{target.size:.2f}x", target.needs, target.inputs)
        for name, target in TARGETS.items()
    ]
    return table(("`--to`", "ending", "size", "needs to run", "inputs of linears"), rows)


def kernels() -> str:
    """Which GPU kernel `runtime/select.py` chooses, with int4 adapters and bfloat16 inputs."""

    def cell(weight: Form, gpu: Gpu) -> str:
        layer = Layer(weight, (Form("dense", 4, 128),) * 2)
        found = stretches(layer, 1, ROWS, gpu)
        ends = [f"to {choice.rows[1]}" for choice in found[:-1]] + ["above" if found[1:] else "all"]
        return ", ".join(f"`{choice.kernel}` {end}" for choice, end in zip(found, ends))

    rows = [
        (name, *(cell(weight, gpu) for gpu in GPUS.values())) for name, weight in WEIGHTS.items()
    ]
    return table(("weight", *GPUS), rows)


def why_not() -> str:
    """What `select` says of the kernels it does not choose, for one row of an int8 weight."""
    layer = Layer(WEIGHTS["dense int8"])
    (choice,) = stretches(layer, 1, 1, GPUS["AMD"])
    return table(("kernel", "why not"), [(f"`{k}`", why) for k, why in choice.why_not.items()])


def _measured(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _speeds(name: str, shape: str, unit: tuple[str, float], columns: Sequence[str]) -> str:
    """The time of the first column, and how many times faster the others are."""
    found, (name_of_unit, size) = _measured(name), unit
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for row in found["rows"]:
        cells.setdefault((row[shape], row["M"]), {})[row["name"]] = row
    rows = []
    for (layer, M), by_name in cells.items():
        first, *others = (by_name[column] for column in columns)
        speedups = [f"{first['seconds'] / row['seconds']:.1f}x" for row in others]
        rows.append((layer, M, f"{first['seconds'] / size:.3g} {name_of_unit}", *speedups))
    where = found.get("gpu", f"{found['threads']} threads, {found['cpu']}")
    head = f"`{found['command']}` ({where}):\n\n"
    return head + table(("layer", "rows", *columns), rows)


def cpu_speeds() -> str:
    """The linears of Llama-2-7B on a CPU."""
    columns = ("float32", "bfloat16", "aten int4", "slim", "slim lora", "slim a8", "slim lora a8")
    return _speeds("kernels-cpu", "shape", ("ms", 1e-3), columns)


def gpu_speeds() -> str:
    """The layers of Llama-2-7B on a GPU."""
    columns = ("bfloat16", "aten int4", "slim", "slim lora")
    return _speeds("gpu-h200-kernels", "layer", ("us", 1e-6), columns)


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "presets": presets,
    "targets": targets,
    "kernels": kernels,
    "why-not": why_not,
    "cpu-speeds": cpu_speeds,
    "gpu-speeds": gpu_speeds,
}


def written(text: str) -> str:
    """A page with its parts written anew."""
    return PART.sub(lambda found: found[1] + "\n" + PARTS[found[2]]() + "\n" + found[3], text)


if __name__ == "__main__":
    for page in sorted(HERE.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := written(before)) != before:
            page.write_text(after, encoding="utf-8")
