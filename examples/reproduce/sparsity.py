"""Quality against sparsity: a share of each row goes, wherever it is.

python examples/reproduce/sparsity.py MODEL -o sparsity.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import study

from slimfx.recipe import Recipe


def main(words: Sequence[str]) -> list[study.Point]:
    """A point for each preset and sparsity."""
    parser = study.options(__doc__, "wanda,sparsegpt,slim,joint-q")
    parser.add_argument("--sparsities", type=study.numbers, default=(0.3, 0.4, 0.5, 0.6, 0.7))
    args = parser.parse_args(words)
    wanted = [
        (preset, sparsity, _at(Recipe.preset(preset), sparsity))
        for preset in args.presets
        for sparsity in args.sparsities
    ]
    found = study.study_of(args).points(wanted)
    return study.finish(found, args.output, study.curves("share of the weights that goes"))


def _at(recipe: Recipe, sparsity: float) -> Recipe:
    assert recipe.prune is not None
    return dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, sparsity=sparsity))


if __name__ == "__main__":
    study.run(main)
