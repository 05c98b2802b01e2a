"""Programs lowered for ONNX: every compressed product is there, answers as before, or is named."""

import dataclasses

import pytest
import torch
from models import KINDS, RECIPES, answer, aten, captured, case, compressed, count
from slimfx.passes.decompose import slimfx_nodes
from slimfx.passes.lower_onnx import lower_onnx
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import ArtifactError
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Inputs, Prune, Quantize, Transform

OP = torch.ops.slimfx.matmul_nbits.default
_GROUPS = Quantize("absmax", granularity="group", group=16)
LEGAL = {
    **{name: RECIPES[name] for name in ("slim", "slim-q", "1:4")},
    "wanda": dataclasses.replace(RECIPES["wanda"], quantize=_GROUPS),
    "int4": Recipe(None, _GROUPS, adapter=Adapter(rank=0.2, bits=4, group=16)),
    "50%": Recipe(
        Prune("wanda", sparsity=0.5),
        dataclasses.replace(_GROUPS, bits=3),
        adapter=Adapter(rank=0.2, bits=4, group=16, sparse=True),
        transform=Transform("smoothquant"),
    ),
    "int8": Recipe(None, Quantize("absmax", bits=8, granularity="channel"), adapter=None),
    "2:4 bf16": Recipe(quantize=None),
    "50% bf16": Recipe(Prune("wanda", sparsity=0.5), quantize=None, adapter=None),
    "fp8": Recipe(None, _GROUPS, adapter=None, inputs=Inputs("fp8")),
}
"""The recipes of models.py, where their groups are too small with groups of 16, and others."""


def same_answer(kind: str, one: ExportedProgram, other: ExportedProgram) -> bool:
    inputs = case(kind).inputs
    a, b = (answer(program.module(), inputs) for program in (one, other))
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_answers_as_before(kind: str) -> None:
    program = compressed(kind, "slim-q")
    lowered, report = lower_onnx(program)
    assert slimfx_nodes(lowered) == 0
    assert count(lowered, OP) == slimfx_nodes(program) >= len(report.nbits) > 0
    assert same_answer(kind, program, lowered)


@pytest.mark.parametrize("recipe", LEGAL)
def test_every_legal_recipe_answers_as_before(recipe: str) -> None:
    program = slimfx.compress(captured("mlp"), LEGAL[recipe], case("mlp").batches)
    lowered, report = lower_onnx(program)
    assert slimfx_nodes(lowered) == 0
    assert (len(report.nbits) > 0) is (LEGAL[recipe].quantize is not None)
    assert (len(report.dense) > 0) is (LEGAL[recipe].quantize is None)
    assert (report.sparse_bytes > report.stored_bytes) is ("first" in report.sparse)
    assert same_answer("mlp", program, lowered)


def test_a_weight_with_two_uses_is_stored_once() -> None:
    lowered, report = lower_onnx(compressed("tied", "slim-q"))
    assert count(lowered, OP) == 9
    assert report.nbits == ("a", "a.L", "a.R", "c", "c.L", "c.R")
    assert sum(name.endswith("slim_B") for name in lowered.state_dict) == 2


def test_the_stored_weights_leave_the_program() -> None:
    program = compressed("llama", "slim-q")
    before = set(program.state_dict)
    lowered, _ = lower_onnx(program)
    assert set(program.state_dict) == before
    gone = {name for name in before if ".slim_" in name}
    assert gone and not gone & set(lowered.state_dict)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("wanda", r"model\.model\.layers\.0\.self_attn\.q_proj: groups of 8 inputs, not a mult"),
        ("50%", r"model\.model\.layers\.0\.self_attn\.q_proj: groups of 12 inputs, not a mult"),
    ],
)
def test_groups_that_no_block_takes_are_named(recipe: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        lower_onnx(compressed("llama", recipe))


def test_an_adapter_is_named_by_its_part() -> None:
    recipe = Recipe(None, _GROUPS, adapter=Adapter(rank=0.2, bits=4, group=4))
    program = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    with pytest.raises(ArtifactError, match=r"^first\.L: groups of 4 inputs"):
        lower_onnx(program)


def test_levels_are_1_and_4() -> None:
    program = compressed("mlp", "slim")
    with pytest.raises(ArtifactError, match="accuracy_level 2 is not one of 1, 4"):
        lower_onnx(program, accuracy_level=2)
    near, _ = lower_onnx(program, accuracy_level=4)
    inputs = case("mlp").inputs
    exact, rounded = (answer(p.module(), inputs) for p in (program, near))
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < 0.05


def test_fp8_inputs_are_written_out_in_aten() -> None:
    program = slimfx.compress(captured("mlp"), LEGAL["fp8"], case("mlp").batches)
    lowered, _ = lower_onnx(program)
    peaks = [node for node in lowered.graph.nodes if node.target is aten.amax.default]
    assert [node.args[1] for node in peaks] == [[0, 1], [0, 1]]
