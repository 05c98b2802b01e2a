"""The paper's tables of accuracy (1 and 5 to 15): every method, pruned and quantized, or one alone.

python examples/reproduce/accuracy.py MODEL -o accuracy.png                 2:4 and 50%, int4
python examples/reproduce/accuracy.py MODEL --values bf16                   pruned alone
python examples/reproduce/accuracy.py MODEL --patterns none --presets absmax,optq,awq,slim,joint-q
python examples/reproduce/accuracy.py MODEL --inputs fp8                    inputs rounded as well
python examples/reproduce/accuracy.py MODEL --tasks zero-shot               the papers' six tasks
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import study
from matplotlib.figure import Figure

from slimfx.bench_methods import cases, variant
from slimfx.steps import Inputs

PRESETS = "magnitude,wanda,sparsegpt,jsq,l2qer,naive-lora,slim,joint-q"


def main(words: Sequence[str]) -> list[study.Point]:
    """A row for each method, pattern and kind of values."""
    parser = study.options(__doc__, PRESETS)
    parser.add_argument("--patterns", type=study.names, default=("2:4", "50%"), help="or none")
    parser.add_argument("--values", choices=("int4", "bf16"), default="int4")
    parser.add_argument("--inputs", choices=("fp8",), help="round what reaches a layer")
    args = parser.parse_args(words)
    patterns = ["-" if pattern == "none" else pattern for pattern in args.patterns]
    inputs = {"inputs": Inputs(args.inputs)} if args.inputs else {}
    wanted = [
        (pattern, args.presets.index(preset), dataclasses.replace(variant(*case), **inputs))
        for case in cases()
        if (preset := case[0]) in args.presets
        and (pattern := case[1]) in patterns
        and case[2] == args.values
    ]
    found = study.study_of(args).points(wanted)
    return study.finish(found, args.output, lambda figure, rows: draw(figure, rows, args.presets))


def draw(figure: Figure, rows: list[study.Point], presets: Sequence[str]) -> None:
    """The methods side by side."""
    axes = figure.subplots()
    study.lines(axes, rows, style="o")
    axes.set_xticks(range(len(presets)), presets, rotation=30)


if __name__ == "__main__":
    study.run(main)
