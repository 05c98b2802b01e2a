"""Every preset from end to end: compressed, saved in both forms, loaded, and the same answers."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from models import (
    SOLVED,
    Case,
    answer,
    bits,
    captured,
    case,
    emulate,
    ids,
    tiny_llama,
)
from slimfx.passes.decompose import slimfx_nodes
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.targets import pt2
from torch.export import ExportedProgram

import slimfx
from slimfx.recipe import Recipe

quantize_fp8 = torch.ops.slimfx.quantize_fp8.default
MODELS = ("mlp", "llama")
FORMS = ("op", "aten")
KINDS_OF_NODES = ("slim-q", "smoothquant", "slim-o", "oats", "joint")
"""Presets that together have every kind of node, for the model whose saving takes long."""
SAVED = [("mlp", preset) for preset in SOLVED] + [("llama", preset) for preset in KINDS_OF_NODES]


@cache
def source(kind: str) -> tuple[ExportedProgram, Case]:
    """A program with the model it was made of; the Llama has one block here."""
    if kind == "mlp":
        return captured("mlp"), case("mlp")
    model = tiny_llama(num_hidden_layers=1).eval()
    each = Case(model, [{"input_ids": ids(1, 4, 24)}], {"input_ids": ids(3, 3, 10)}, root="model.")
    return slimfx.capture(model), each


@cache
def small(kind: str, preset: str) -> ExportedProgram:
    program, each = source(kind)
    return slimfx.compress(program, preset, each.batches)


@pytest.mark.parametrize("preset", SOLVED)
@pytest.mark.parametrize("kind", MODELS)
def test_the_answer_is_that_of_the_model_with_the_stored_weights(kind: str, preset: str) -> None:
    program, each = small(kind, preset), source(kind)[1]
    recipe = Recipe.preset(preset)
    emulated, replaced = emulate(each, program, recipe)
    assert len(replaced) == {"mlp": 2, "llama": 7}[kind]
    found = program.module()(**each.inputs)
    rounds = sum(node.target is quantize_fp8 for node in program.graph.nodes)
    if recipe.inputs is None:
        assert rounds == 0
        torch.testing.assert_close(found, answer(emulated, each.inputs), rtol=2e-5, atol=2e-5)
    else:
        assert rounds > 0
    original = answer(each.model, each.inputs)
    assert (found - original).norm() < original.norm()  # 0.95 of it at worst
    assert (found - original).abs().max() > 1e-2


@pytest.mark.parametrize("preset", SOLVED)
@pytest.mark.parametrize("kind", MODELS)
def test_the_plan_knows_the_bytes_the_layout_and_the_rank_of_each_layer(
    kind: str, preset: str
) -> None:
    program, planned = small(kind, preset), slimfx.plan(source(kind)[0], preset)
    rows = [row for row in planned.rows if not row.skipped]
    for row, layer in zip(rows, manifest_of(program).layers, strict=True):
        stored = sum(
            tensor.nbytes
            for name, tensor in program.state_dict.items()
            if name.startswith(f"{row.name}.slim_")
        )
        assert row.bytes_after == layer.bytes == stored
        assert (row.name, row.layout, row.rank) == (layer.name, layer.layout, layer.rank)


@pytest.mark.parametrize(("kind", "preset"), SAVED)
@pytest.mark.parametrize("form", FORMS)
def test_a_saved_file_repeats_its_golden_outputs_and_answers_other_inputs(
    kind: str, preset: str, form: str, tmp_path: Path
) -> None:
    program, path = small(kind, preset), tmp_path / "small.pt2"
    slimfx.save(program, path, form=form, verify=False)
    assert slimfx.check(path).identical
    assert pt2.read_manifest(path) == dataclasses.replace(manifest_of(program), form=form)
    if kind == "llama":
        return
    loaded, inputs = slimfx.load(path), case("mlp").inputs
    assert (slimfx_nodes(loaded) == 0) == (form == "aten")
    found, expected = loaded.module()(**inputs), program.module()(**inputs)
    if form == "op":
        assert bits(found) == bits(expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preset", SOLVED)
def test_the_same_input_gives_the_same_bytes_twice(preset: str) -> None:
    program, each = source("mlp")
    again = slimfx.compress(program, preset, each.batches)
    first = small("mlp", preset)
    assert {name: bits(t) for name, t in again.state_dict.items()} == {
        name: bits(t) for name, t in first.state_dict.items()
    }
    assert manifest_of(again) == manifest_of(first)
