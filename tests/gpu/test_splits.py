"""The search for splits, on a tiny layer: in the interpreter, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import splits
from slimfx.runtime.kernels.mma import Split, split_for

from slimfx.gpu_contenders import Layer

Run = Callable[..., Any]


def few(device: str) -> list[tuple[tuple[int, int, int, int], bool, bool]]:
    """What was found for a tiny layer."""
    rows = splits.measured(device, [Layer("tiny", 512, (32, 16))], [1, 9], 20_000)
    return [(row.split, row.microseconds > 0, row.chosen) for row in rows]


def test_the_chosen_split_is_always_measured(run: Run) -> None:
    tiny = [split_for(48, 512, M) for M in (1, 9)]
    shapes = [(each.tiles, each.warps, each.ahead, each.across) for each in tiny]
    assert run(few) == [(shape, True, True) for shape in shapes]


def test_all_inputs_are_shared_by_enough_warps() -> None:
    layer = Layer("gate+up", 4096, (11008, 11008))
    found = splits.splits(layer, 1)
    assert found[0] == split_for(22016, 4096, 1) and len(found) == len(set(found)) > 10
    assert Split(2, 2, 1) in found and Split(2, 1, 3, 2) in found
    assert all(each.warps <= 16 for each in found)
