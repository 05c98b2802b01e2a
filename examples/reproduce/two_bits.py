"""Two bits a weight, or four bits and half of the weights? Each with the same adapters.

python examples/reproduce/two_bits.py MODEL -o two_bits.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import study

from slimfx.recipe import Recipe

FORMS = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "4 bits, 2:4": {"bits": 4, "sparsity": None},
    "4 bits, 50%": {"bits": 4, "sparsity": 0.5},
}


def main(words: Sequence[str]) -> list[study.Point]:
    """A point for each preset and form, at the bits that it takes."""
    args = study.options(__doc__, "slim-q,joint-q").parse_args(words)
    wanted = [
        (form, 0.0, _in_form(Recipe.preset(preset), how))
        for form, how in FORMS.items()
        for preset in args.presets
    ]
    found = study.study_of(args).points(wanted)
    draw = study.curves("bits a weight, scales and adapters included", x="bits_per_weight")
    return study.finish(found, args.output, draw)


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
