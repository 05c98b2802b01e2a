"""Promise 7: the same recipe, data and seed give the same bytes, and the random state stays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from models import RECIPES, captured, case

import slimfx


@pytest.mark.parametrize("recipe", ["slim-q", "joint-q"])
def test_deterministic(recipe: str, tmp_path: Path) -> None:
    made = case("mlp")
    states = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state()
    for name in ("a", "b"):
        small = slimfx.compress(captured("mlp"), RECIPES.get(recipe, recipe), made.batches)
        slimfx.save(small, tmp_path / name)
    after = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state()
    assert after[:2] == states[:2] and after[2].equal(states[2])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
