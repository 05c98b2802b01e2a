"""The whole pipeline over methods, layouts, dtypes and scales: finite, or an error with a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from models import RECIPES, normal
from torch import Tensor, nn
from trust import trying

import slimfx
from slimfx.errors import SlimError
from slimfx.recipe import PRESETS, Recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (1e-45, 1e-41, 1e-38, 1e-30, 1e-20, 1e-10, 1e-4, 1e4, 1e10, 1e20, 1e30, 1e38)
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one-hot": lambda x: torch.eye(16)[torch.arange(len(x)) % 16],
    "one column": lambda x: x * (torch.arange(16) == 3),
    "90% padding": lambda x: x * (torch.arange(len(x)) % 10 == 0)[:, None],
    "constant": lambda x: torch.ones_like(x),
    "denormal": lambda x: x * 1e-41,
    "of both signs and far apart": lambda x: x.sign() * 10 ** (8 * x.abs()).clamp(max=30),
}
GROUPED = {
    name: dataclasses.replace(
        recipe, quantize=dataclasses.replace(recipe.quantize, group=8) if recipe.quantize else None
    )
    for name, recipe in PRESETS.items()
    if recipe.tune is None
}
ALL: dict[str, Recipe] = {**GROUPED, **{f"layout {name}": each for name, each in RECIPES.items()}}


def finite_or_named(recipe: Recipe, weight: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Compress one layer, and look at all that is stored and answered."""
    layer = nn.Linear(16, 12, dtype=dtype)
    layer.weight.data = weight.to(dtype)
    with trying("numerics"):
        program = slimfx.capture(nn.Sequential(layer).eval(), (normal(3, 5, 16).to(dtype),))
        try:
            small = slimfx.compress(program, recipe, [x.to(dtype)])
        except SlimError as error:
            assert "0" in str(error)  # the layer's name
            return
        stored = [t.float() for t in small.state_dict.values() if t.is_floating_point()]
        assert all(t.isfinite().all() for t in stored)
        bound = 1e30 if dtype is torch.float32 else 1.0
        if weight.abs().max() < bound:
            assert small.module()(normal(4, 5, 16).to(dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_any_scale_of_weights_and_inputs(name: str, dtype: torch.dtype) -> None:
    for i, scale in enumerate(SCALES):
        weight, x = normal(i, 12, 16), normal(20 + i, 40, 16)
        finite_or_named(ALL[name], weight * scale, x, dtype)
        finite_or_named(ALL[name], weight, x * scale, dtype)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", ALL)
def test_any_kind_of_inputs(name: str, kind: str) -> None:
    x = INPUTS[kind](normal(2, 40, 16))
    finite_or_named(ALL[name], normal(1, 12, 16), x, torch.float32)
