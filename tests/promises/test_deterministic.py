"""Promise 7: the same recipe, data and seed give the same bytes, and the random state stays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from models import RECIPES, captured, case, normal
from torch import nn

import slimfx


def random_states() -> tuple[object, str, list[int]]:
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("recipe", ["slim-q", "joint-q"])
def test_deterministic(recipe: str, tmp_path: Path) -> None:
    made = case("mlp")
    before = random_states()
    for name in ("a", "b"):
        small = slimfx.compress(captured("mlp"), RECIPES.get(recipe, recipe), made.batches)
        slimfx.save(small, tmp_path / name)
    assert random_states() == before
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_program_that_draws_leaves_the_random_state() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    program = torch.export.export(model, (normal(0, 4, 8),))
    before = random_states()
    slimfx.compress(program, RECIPES["slim-q"], [normal(1, 4, 8)])
    assert random_states() == before
