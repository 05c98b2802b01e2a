"""Two bits a weight, or four bits and half of the weights? Each with the same adapters.

python examples/reproduce/two_bits.py MODEL -o two_bits.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import study
from matplotlib.figure import Figure

from slimfx.recipe import Recipe

FORMS = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "4 bits, 2:4": {"bits": 4, "sparsity": None},
    "4 bits, 50%": {"bits": 4, "sparsity": 0.5},
}


def main(words: Sequence[str]) -> list[study.Point]:
    """A point for each form and preset."""
    args = study.options(__doc__, "slim-q,joint-q").parse_args(words)
    wanted = [
        (preset, float(i), _in_form(Recipe.preset(preset), how))
        for i, how in enumerate(FORMS.values())
        for preset in args.presets
    ]
    return study.finish(study.study_of(args).points(wanted), args.output, draw)


def draw(figure: Figure, rows: list[study.Point]) -> None:
    """The forms side by side, at each point the bits that a weight takes, adapters included."""
    axes = figure.subplots()
    study.lines(axes, rows, style="o")
    for row in rows[1:]:
        text, place = f"{row.bits_per_weight:.2f} bits", (row.x, row.quality)
        axes.annotate(text, place, fontsize=7, xytext=(5, 5), textcoords="offset points")
    axes.set_xticks(range(len(FORMS)), FORMS)
    axes.set_xmargin(0.15)


def _in_form(recipe: Recipe, how: dict) -> Recipe:
    """The recipe at other bits, and dense where no sparsity is named."""
    assert recipe.prune is not None and recipe.quantize is not None
    prune = None
    if "sparsity" in how:
        prune = dataclasses.replace(recipe.prune, sparsity=how["sparsity"])
    quantize = dataclasses.replace(recipe.quantize, bits=how["bits"])
    return dataclasses.replace(recipe, prune=prune, quantize=quantize)


if __name__ == "__main__":
    study.run(main)
