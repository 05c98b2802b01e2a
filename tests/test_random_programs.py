"""Random programs through capture, compress, save, load and lower: outputs are the emulation's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import RECIPES, stored_weight
from random_programs import Drawn, drawn
from slimfx.passes.decompose import decompose
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from trust import trying

import slimfx
from slimfx.recipe import Recipe

SEEDS = 300
CHEAP = ("slim", "wanda", "int4", "1:4")


def emulated(each: Drawn, program: ExportedProgram, recipe: Recipe) -> nn.Module:
    """The model with the weights that the program stores, however it holds them."""
    model = copy.deepcopy(each.model)
    for name, parameter in model.named_parameters():
        turned = name.endswith(".w")
        shape = parameter.shape[::-1] if turned else parameter.shape
        prefix = name.removesuffix(".weight")
        W = stored_weight(program, prefix, shape, recipe) if len(shape) == 2 else None
        if W is not None:
            parameter.data = (W.T if turned else W).contiguous()
    return model


def answers(module: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(module(*inputs))


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all((a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1) for a, b in pairs)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_program(seed: int, tmp_path: Path) -> None:
    each, recipe = drawn(seed), RECIPES[CHEAP[seed % len(CHEAP)]]
    with trying("random programs"):
        program = slimfx.capture(copy.deepcopy(each.model), each.example)
        small = slimfx.compress(program, recipe, each.batches)
        expected = answers(emulated(each, small, recipe), each.other)
        assert any(".slim_" in name for name in small.state_dict)
        slimfx.save(small, tmp_path / "model.pt2", verify=False)
        loaded = slimfx.load(tmp_path / "model.pt2")
        lowered = copy.deepcopy(decompose(loaded))  # a run writes to the buffers it shares
        for each_form in (small, loaded, lowered):
            assert close(answers(each_form.module(), each.other), expected)
