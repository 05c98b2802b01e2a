"""Is a large model, compressed, better than a small one as it is? Loss a byte of text against size.

python examples/reproduce/pareto.py LARGE SMALL ... -o pareto.png

Bits to predict a byte, so that models with other tokenizers compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import study
from matplotlib.figure import Figure
from torch.export import ExportedProgram

import slimfx
from slimfx import data, show
from slimfx.cli_bench import write_out
from slimfx.recipe import Calibration, Recipe


@dataclass(frozen=True)
class Row:
    """One model under one recipe."""

    model: str
    recipe: str
    """A preset's name, or "dense" in 16 bits."""
    megabytes: float
    """Of all weights, embeddings included."""
    bits_per_byte: float
    """Of the text, predicted token by token."""


def main(words: Sequence[str]) -> list[Row]:
    """A row for each model as it is, and for each preset."""
    parser = study.options(__doc__, "absmax,slim-q,joint-q")
    parser.add_argument("smaller", nargs="*", help="other models")
    args = parser.parse_args(words)
    return study.finish(_rows(args), args.output, draw)


def _rows(args) -> Iterator[Row]:  # type: ignore[no-untyped-def]
    sampling = Calibration(samples=args.calibration_samples, length=args.length)
    with show.line("reproduce") as tell:
        for i, folder in enumerate((args.model, *args.smaller)):
            tell(i / (1 + len(args.smaller)), folder)
            name, program = Path(folder).name, slimfx.capture(folder)
            stored = slimfx.capture(folder, dtype="bfloat16", weights=False)  # what files hold
            yield Row(name, "dense", slimfx.plan(stored).bytes_before / 1e6, _bits(program, args))
            for preset in args.presets:
                recipe = Recipe.from_dict({"preset": preset, "calibration": vars(sampling)})
                small = slimfx.compress(program, recipe, args.data)
                size = slimfx.plan(stored, recipe).bytes_after / 1e6
                yield Row(name, preset, size, _bits(small, args))


def _bits(program: ExportedProgram, args) -> float:  # type: ignore[no-untyped-def]
    """Bits to predict a byte of the windows that `evaluate` reads."""
    text = data.python_documents()[1] if args.text is None else args.text
    found = slimfx.evaluate(program, text, samples=args.samples, length=args.length)
    length = data.longest(program, args.length)
    read = data.token_stream(program, text)[: found.samples * length].tolist()
    size = len(data.tokenizer_of(program).decode(read, skip_special_tokens=True).encode())
    return math.log2(found.value) * len(read) / size


def draw(figure: Figure, rows: list[Row]) -> None:
    """A line for each model, a mark for each recipe."""
    axes = figure.subplots()
    for model in dict.fromkeys(row.model for row in rows):
        own = sorted((r.megabytes, r.bits_per_byte, r.recipe) for r in rows if r.model == model)
        axes.plot([at for at, _, _ in own], [bits for _, bits, _ in own], "o-", label=model)
        for size, bits, recipe in own:
            axes.annotate(
                recipe, (size, bits), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
    axes.set_xlabel("MB of weights")
    axes.set_ylabel("bits a byte of text")
    axes.set_xscale("log")
    write_out(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == "__main__":
    study.run(main)
