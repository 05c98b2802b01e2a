"""The search for splits, on a tiny layer: in the interpreter, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import splits
from slimfx.runtime.kernels.mma import Split, split_for

from slimfx.gpu_contenders import Layer

Run = Callable[..., Any]


def few(device: str) -> list[tuple[int, str, tuple[int | None, ...], bool, bool]]:
    """What was found for a tiny layer."""
    rows = splits.measured(device, [Layer("tiny", 512, (16, 8))], [1, 9, 40], 1)
    return [(row.M, row.kernel, row.split, row.microseconds > 0, row.chosen) for row in rows]


def test_the_chosen_split_is_always_measured(run: Run) -> None:
    found = run(few)
    for M in (1, 9, 40):
        own = split_for(24, 512, M)
        shape = (own.tiles, own.warps, own.ahead, own.across)
        assert (M, "decode_24", shape, True, True) in found
    assert (40, "portable_24", (None, None, None), True, True) in found
    assert sum(chosen for *_, chosen in found) == 4 and all(timed for *_, timed, _ in found)


def test_all_inputs_are_shared_by_enough_warps() -> None:
    layer = Layer("gate+up", 4096, (11008, 11008))
    found = splits.splits(layer, 1)
    assert found[0] == split_for(22016, 4096, 1) and len(found) == len(set(found)) > 10
    assert Split(2, 2, 1) in found and Split(2, 1, 3, 2) in found
    assert all(each.warps <= 16 for each in found)
