"""The tables of methods: every preset has its rows, and memory and FLOPs are those of the paper."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from models import QUICK, Chain, demo_lm, normal
from torch import nn
from torch.export import ExportedProgram

import slimfx
from slimfx import bench_methods
from slimfx.bench_methods import PATTERNS, Row, cases, variant
from slimfx.errors import RecipeError
from slimfx.recipe import PRESETS, Recipe
from slimfx.steps import Adapter, Prune, Transform

CASES = cases()


def test_every_preset_is_measured_and_none_twice() -> None:
    assert {preset for preset, _, _ in CASES} == set(PRESETS)
    assert max(Counter(CASES).values()) == 1
    assert {pattern for _, pattern, _ in CASES} == set(PATTERNS)
    assert {values for _, _, values in CASES} == {"int4", "bf16"}
    order = [PATTERNS.index(pattern) for _, pattern, _ in CASES]
    assert order == sorted(order)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_case_is_its_preset_with_that_pattern_and_those_values(
    case: tuple[str, str, str],
) -> None:
    preset, pattern, values = case
    recipe, own = variant(*case), Recipe.preset(preset)
    assert (recipe.prune is None) == (pattern == "-")
    if recipe.prune is not None:
        assert recipe.prune.method == own.prune.method
        assert recipe.prune.sparsity == {"2:4": None, "50%": 0.5}[pattern]
        assert (recipe.prune.n, recipe.prune.m) == (2, 4)
    assert (recipe.quantize is None) == (values == "bf16")
    if recipe.quantize is not None and own.quantize is not None:
        assert recipe.quantize == own.quantize and own.quantize.bits == 4
    same = ("adapter", "solve", "transform", "inputs", "tune")
    assert all(getattr(recipe, step) == getattr(own, step) for step in same)


def test_a_pattern_that_a_preset_does_not_have_is_refused() -> None:
    with pytest.raises(RecipeError, match="preset absmax prunes nothing; its pattern is -"):
        variant("absmax", "2:4", "int4")
    with pytest.raises(RecipeError, match="pattern '3:4' is not one of 2:4, 50%, -"):
        variant("wanda", "3:4", "int4")
    with pytest.raises(RecipeError, match="preset: 'wand' is not one of "):
        variant("wand", "2:4", "int4")


N, K = 32, 64


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def program(request: pytest.FixtureRequest) -> ExportedProgram:
    """Two linears of [32, 64] and [64, 32], with a bias, and a norm between."""
    model = Chain(nn.Linear(K, N), nn.LayerNorm(N), nn.Linear(N, K)).to(request.param)
    return slimfx.capture(model, (normal(1, 4, K).to(request.param),))


OTHER = 2 * (N + K + 2 * N)
"""16-bit bytes of the biases and the norm."""


def share(bits: float) -> float:
    """Of the bytes in 16 bits, for two linears whose bits a weight add up to this."""
    return (bits * N * K / 8 + OTHER) / (2 * 2 * N * K + OTHER)


MEASURES = {
    # two of four in 4 bits: 3 bits a weight, and one scale
    "2:4 int4": (Recipe(adapter=None), share(6) + 4 / (4 * N * K + OTHER), 0.5),
    "2:4 bf16": (Recipe(quantize=None, adapter=None), share(18), 0.5),
    "a quarter in bf16": (
        Recipe(Prune(sparsity=0.75), None, adapter=None),
        share(2 * (1 + 4)),
        0.25,
    ),
    "rank 4 in bf16": (
        Recipe(quantize=None, adapter=Adapter(rank=4)),
        share(18) + 2 * 4 * 2 * (N + K) / (4 * N * K + OTHER),
        0.5 + 4 * (N + K) / (N * K),
    ),
    "rank 4, L sparse": (
        Recipe(quantize=None, adapter=Adapter(rank=4, sparse=True)),
        share(18) + 4 * (2 * (N + K) + (9 / 8) * (N + K)) / (4 * N * K + OTHER),
        0.5 + 4 * (N + K + (N + K) / 2) / (2 * N * K),
    ),
    "scaled inputs": (
        Recipe(quantize=None, adapter=None, transform=Transform("smoothquant")),
        share(18) + 2 * (N + K) / (4 * N * K + OTHER),
        0.5,
    ),
    "one layer as it is": (
        Recipe(quantize=None, adapter=None, skip=("layers.2",)),
        share(16 + 9),
        0.75,
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_memory_and_flops_are_those_of_equations_12_and_13(
    program: ExportedProgram, name: str
) -> None:
    recipe, memory, flops = MEASURES[name]
    planned = slimfx.plan(program, recipe)
    assert bench_methods.memory_share(planned) == pytest.approx(memory, rel=1e-9)
    assert bench_methods.flops_share(planned, recipe) == pytest.approx(flops, rel=1e-9)


def test_a_model_is_measured_dense_first_and_then_case_by_case() -> None:
    told: list[tuple[float, str]] = []
    rows = bench_methods.bench_methods(
        demo_lm(),
        only=["magnitude", "absmax"],
        sampling=QUICK,
        samples=2,
        progress=lambda share, what: told.append((share, what)),
    )
    dense = next(rows)
    assert dense == Row("dense", "-", "bf16", dense.quality, "perplexity", 16.0, 1.0, 1.0, 0.0, 0.0)
    assert told == [(0.0, "dense")]  # a row is there before the next is begun
    found = list(rows)
    expected = [case for case in CASES if case[0] in ("magnitude", "absmax")]
    assert [(row.method, row.pattern, row.values) for row in found] == expected
    assert [share for share, _ in told[1:]] == [i / len(expected) for i in range(len(expected))]
    for row in found:
        recipe = dataclasses.replace(variant(row.method, row.pattern, row.values))
        planned = slimfx.plan(demo_lm(), recipe)
        assert row.bits_per_weight == planned.bits_per_weight
        assert row.seconds > 0
        assert row.metric == "perplexity" and row.quality > 0.9 * dense.quality
    by_case = {(row.pattern, row.values): row for row in found}
    assert by_case["-", "int4"].quality < by_case["2:4", "int4"].quality
    assert by_case["2:4", "bf16"].memory > by_case["2:4", "int4"].memory
    assert by_case["50%", "int4"].flops == by_case["2:4", "int4"].flops < 1
