"""Quality against the rank of the adapters, as a share of the smaller side of a layer.

python examples/reproduce/rank.py MODEL -o rank.png
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import study

from slimfx.recipe import Recipe


def main(words: Sequence[str]) -> list[study.Point]:
    """A point for each preset and rank."""
    parser = study.options(__doc__, "naive-lora,slim,joint")
    parser.add_argument("--ranks", type=study.numbers, default=(0, 0.025, 0.05, 0.1, 0.2, 0.3))
    args = parser.parse_args(words)
    wanted = [
        (preset, rank, _with_rank(Recipe.preset(preset), rank))
        for preset in args.presets
        for rank in args.ranks
    ]
    found = study.study_of(args).points(wanted)
    return study.finish(found, args.output, study.curves("rank"))


def _with_rank(recipe: Recipe, rank: float) -> Recipe:
    """The recipe with another rank, without adapters at 0."""
    assert recipe.adapter is not None
    adapter = dataclasses.replace(recipe.adapter, rank=rank) if rank else None
    return dataclasses.replace(recipe, adapter=adapter)


if __name__ == "__main__":
    study.run(main)
