"""Promise 13: each format keeps its signal to noise, and what compensates an error lessens it."""

from __future__ import annotations

import math

import pytest
import torch
from slimfx.runtime.manifest import manifest_of
from torch import nn

import slimfx
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Prune, Quantize

FLOORS = {
    # prune to 2:4, bits, adapter: dB for normal weights and correlated inputs, one less than seen
    (False, 8, False): 44.5,
    (False, 4, False): 19.5,
    (False, 3, False): 12.2,
    (True, 4, False): 7.5,
    (True, 4, True): 10.6,
}


def signal(sparse: bool, bits: int, adapter: bool) -> float:
    """dB of the output on fresh inputs."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=draw) * torch.logspace(0, -1.5, 128)
    x, fresh = (torch.randn(512, 128, generator=draw) @ mix for _ in "12")
    layer = nn.Linear(128, 96, bias=False)
    layer.weight.data = torch.randn(96, 128, generator=draw)
    program = slimfx.capture(nn.Sequential(layer).eval(), (fresh[:4],))
    recipe = Recipe(
        prune=Prune("wanda") if sparse else None,
        quantize=Quantize("absmax", bits=bits, granularity="group", group=32),
        adapter=Adapter(rank=0.1) if adapter else None,
    )
    small = slimfx.compress(program, recipe, [x])
    y, exact = small.module()(fresh), layer(fresh)
    assert manifest_of(small).layers
    return 20 * math.log10(exact.norm().item() / (y - exact).norm().item())


@pytest.mark.parametrize(("sparse", "bits", "adapter"), FLOORS)
def test_numbers_floor(sparse: bool, bits: int, adapter: bool) -> None:
    assert signal(sparse, bits, adapter) > FLOORS[sparse, bits, adapter]


def test_what_compensates_lessens_the_error() -> None:
    assert signal(True, 4, True) > signal(True, 4, False) + 1
    assert signal(False, 8, False) > signal(False, 4, False) > signal(False, 3, False)
