"""decompose: the same program in plain ATen, weights as packed as before."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from models import aten, bits, captured, case, compressed, count
from slimfx.passes.decompose import decompose, slimfx_nodes
from slimfx.runtime.manifest import manifest_of
from torch.export import ExportedProgram

import slimfx
from slimfx.recipe import Recipe
from slimfx.steps import Inputs


@cache
def decomposed(kind: str, recipe: str) -> ExportedProgram:
    """The plain form of a compressed program, made once."""
    return decompose(compressed(kind, recipe))


CASES = [
    ("llama", "slim"),
    ("gpt2", "slim-q"),
    ("tied", "wanda"),
    ("in out", "int4"),
    ("opt", "50%"),
]


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_the_ops_are_written_out_and_the_answers_stay(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    plain = decomposed(kind, recipe)
    assert slimfx_nodes(program) > 0 and slimfx_nodes(plain) == 0
    assert not any("slimfx" in str(node.target) for node in plain.graph.nodes)
    inputs = case(kind).inputs
    torch.testing.assert_close(
        plain.module()(**inputs), program.module()(**inputs), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_the_stored_tensors_are_the_same_ones(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    plain = decomposed(kind, recipe)
    assert {k: bits(t) for k, t in plain.state_dict.items()} == {
        k: bits(t) for k, t in program.state_dict.items()
    }
    largest = max((t.numel() for t in plain.constants.values() if torch.is_tensor(t)), default=0)
    assert largest <= 128  # nothing of a weight's size was folded


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_every_op_becomes_one_linear_and_no_other_op_is_touched(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    plain = decomposed(kind, recipe)
    before = count(program, aten.linear.default)
    assert count(plain, aten.linear.default) == before + slimfx_nodes(program)
    for op in (
        aten.scaled_dot_product_attention.default,
        aten.layer_norm.default,
        aten.embedding.default,
        aten.relu.default,
        aten.silu.default,
    ):
        assert count(plain, op) == count(program, op), op


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_ranges_inputs_and_signature_survive(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    plain = decomposed(kind, recipe)
    assert plain.range_constraints == program.range_constraints
    assert plain.graph_signature.user_inputs == program.graph_signature.user_inputs
    assert plain.call_spec == program.call_spec
    assert set(plain.graph_signature.buffers) == set(program.graph_signature.buffers)


def test_fp8_becomes_casts_to_it_and_back_and_one_choice_for_each_input() -> None:
    recipe = Recipe(adapter=None, inputs=Inputs("fp8"))
    program = slimfx.compress(captured("llama"), recipe, case("llama").batches)
    plain = decompose(program)
    fp8 = torch.ops.slimfx.quantize_fp8.default
    inputs = 2 * 4  # for q, k, v; for o; for gate and up; for down
    assert count(program, fp8) == inputs and slimfx_nodes(program) == inputs + 14
    assert slimfx_nodes(plain) == 0
    assert count(plain, aten.where.self) == count(program, aten.where.self) + inputs
    assert count(plain, aten.linear.default) == count(program, aten.linear.default) + 14
    found, expected = (each.module()(**case("llama").inputs) for each in (plain, program))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_given_program_is_unchanged() -> None:
    program = compressed("tied", "slim")
    before = (str(program.graph), str(program.graph_signature), manifest_of(program))
    decompose(program)
    assert (str(program.graph), str(program.graph_signature), manifest_of(program)) == before


def test_a_program_without_our_ops_keeps_its_nodes() -> None:
    program = captured("mlp")
    plain = decompose(program)
    assert slimfx_nodes(program) == slimfx_nodes(plain) == 0
    assert [str(n.target) for n in plain.graph.nodes] == [
        str(n.target) for n in program.graph.nodes
    ]
