"""Promise 9: every linear is in the report, compressed or with the reason why it is not."""

from __future__ import annotations

import dataclasses

import pytest
from models import RECIPES, captured, case
from slimfx.passes.find_linears import find_linears
from slimfx.runtime.manifest import manifest_of

import slimfx


@pytest.mark.parametrize("kind", ["llama", "bert", "tied", "encoder layer", "in out"])
def test_nothing_silent(kind: str) -> None:
    program = captured(kind)
    recipe = dataclasses.replace(RECIPES["slim-q"], skip=("*first*", "*q_proj*", "*linear1*"))
    manifest = manifest_of(slimfx.compress(program, recipe, case(kind).batches))
    named = [row.name for row in manifest.layers] + list(manifest.skipped)
    assert sorted(named) == sorted(site.name for site in find_linears(program))
    assert all(manifest.skipped.values())  # each with a reason
    assert all(row.tokens > 0 and row.bytes > 0 for row in manifest.layers)


def test_what_a_solver_gave_up_is_said() -> None:
    program, made = captured("mlp"), case("mlp")
    dead = [{"x": batch["x"].clone()} for batch in made.batches]
    for batch in dead:
        batch["x"][:, :4] = 0  # inputs that calibration never saw
    manifest = manifest_of(slimfx.compress(program, RECIPES["slim-q"], dead))
    assert any(row.notes for row in manifest.layers)
