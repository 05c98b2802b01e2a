"""Compressing leaves everything outside as it was: the program, its data, the random state."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from models import KINDS, RECIPES, Chain, bits, captured, case, compressed, demo_lm, normal
from slimfx.runtime.manifest import manifest_of
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import slimfx
from slimfx.recipe import Calibration, Recipe


def snapshot(program: ExportedProgram) -> dict[str, Any]:
    """All that a program consists of, as values that later writes cannot reach."""
    leaves = pytree.tree_leaves(program.example_inputs)
    return {
        "code": program.graph_module.code,
        "graph": str(program.graph),
        "values": [str(node.meta.get("val")) for node in program.graph.nodes],
        "stacks": [str(node.meta.get("nn_module_stack")) for node in program.graph.nodes],
        "signature": str(program.graph_signature),
        "state_dict": [(name, bits(t)) for name, t in program.state_dict.items()],
        "memory": {name: t.data_ptr() for name, t in program.state_dict.items()},
        "constants": [(k, bits(t)) for k, t in program.constants.items() if torch.is_tensor(t)],
        "inputs": [bits(t) for t in leaves if torch.is_tensor(t)],
        "ranges": str(program.range_constraints),
        "calls": str(program.module_call_graph),
        "manifest": manifest_of(program),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_that_was_compressed_is_the_same_to_the_byte(kind: str) -> None:
    program, each = captured(kind), case(kind)
    before = snapshot(program)
    weights = {name: bits(t) for name, t in each.model.state_dict().items()}
    answers = bits(program.module()(**each.inputs))
    slimfx.plan(program, RECIPES["slim-q"])
    small = slimfx.compress(program, RECIPES["slim-q"], each.batches)
    small.module()(**each.inputs)
    assert snapshot(program) == before
    assert {name: bits(t) for name, t in each.model.state_dict().items()} == weights
    assert bits(program.module()(**each.inputs)) == answers


@pytest.mark.parametrize("kind", ["gpt2", "tied"])
def test_saving_leaves_the_compressed_program_as_it_was(kind: str, tmp_path: Path) -> None:
    small = compressed(kind, "slim-q")
    before = snapshot(small)
    for form in ("op", "aten"):
        slimfx.save(small, tmp_path / form, form=form, verify=False)
    assert snapshot(small) == before


@pytest.mark.parametrize("kind", ["llama", "bert", "encoder layer"])
def test_calibration_batches_and_example_inputs_are_only_read(kind: str) -> None:
    program, batches = captured(kind), case(kind).batches
    before = [bits(t) for batch in batches for t in batch.values()]
    slimfx.compress(program, "slim", batches)
    assert [bits(t) for batch in batches for t in batch.values()] == before


class InPlace(nn.Module):
    """Writes to its input, as x += f(x) does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x += self.a(x)
        return x


def test_batches_are_not_written_to_by_a_model_that_writes_to_its_input() -> None:
    program = slimfx.capture(Chain(InPlace(), nn.Linear(16, 8)), (normal(1, 4, 16),))
    example = bits(program.example_inputs[0][0])
    batch = normal(2, 20, 16)
    before = bits(batch)
    slimfx.compress(program, "slim", [batch])
    assert bits(batch) == before
    assert bits(program.example_inputs[0][0]) == example


class Counting(nn.Module):
    """Counts its calls in a buffer, which the answer depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(16))
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.b(self.a(x) + self.calls)


@pytest.fixture(params=["as exported", "functional"])
def counting(request: pytest.FixtureRequest) -> ExportedProgram:
    """A program with a buffer that it writes to, before and after functionalization."""
    program = slimfx.capture(Counting(), (normal(1, 4, 16),))
    return program if request.param == "as exported" else program.run_decompositions({})


def test_compress_does_not_write_to_a_buffer_that_the_program_writes_to(
    counting: ExportedProgram,
) -> None:
    small = slimfx.compress(counting, "slim", [normal(2, 20, 16), normal(3, 20, 16)])
    assert counting.state_dict["calls"].tolist() == [0] * 16
    assert small.state_dict["calls"].tolist() == [0] * 16


def test_running_the_compressed_program_leaves_the_source_and_its_buffer(
    counting: ExportedProgram,
) -> None:
    small = slimfx.compress(counting, "slim", [normal(2, 20, 16)])
    module = small.module()
    first, second = (module(normal(3, 5, 16)) for _ in range(2))
    assert not torch.equal(first, second)
    assert counting.state_dict["calls"].tolist() == [0] * 16


def test_a_program_that_writes_to_a_buffer_can_be_saved_as_it_stands(
    counting: ExportedProgram, tmp_path: Path
) -> None:
    small = slimfx.compress(counting, "slim", [normal(2, 20, 16)])
    slimfx.save(small, tmp_path / "small.pt2")
    assert small.state_dict["calls"].tolist() == [0] * 16
    assert slimfx.load(tmp_path / "small.pt2").state_dict["calls"].tolist() == [0] * 16


def random_state() -> tuple[Any, ...]:
    """The global random state of torch, NumPy and Python."""
    name, keys, *rest = numpy.random.get_state()
    return (torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate())


@pytest.mark.parametrize("kind", ["llama", "bert", "mlp"])
@pytest.mark.parametrize("recipe", ["slim", "slim-q", "wanda"])
def test_the_global_random_state_is_untouched(kind: str, recipe: str) -> None:
    program = captured(kind)
    before = random_state()
    slimfx.compress(program, RECIPES[recipe], case(kind).batches)
    assert random_state() == before


def test_the_global_random_state_is_untouched_by_drawing_windows_from_text() -> None:
    recipe = Recipe(
        calibration=Calibration(samples=1, length=16), skip=("layers.[1-5].*", "lm_head")
    )
    program = demo_lm()
    before = random_state()
    slimfx.compress(program, recipe)
    assert random_state() == before


def test_the_global_random_state_is_untouched_by_dropout_left_in_a_program() -> None:
    model = Chain(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 8)).train()
    program = torch.export.export(model, (normal(1, 4, 16),))
    assert any("dropout" in str(node.target) for node in program.graph.nodes)
    before = random_state()
    slimfx.compress(program, "slim", [normal(2, 20, 16)])
    assert random_state() == before


def test_a_failed_compression_leaves_the_program_as_it_was() -> None:
    program = captured("mlp")
    before = snapshot(program)
    bad = torch.full((4, 16), float("nan"))
    with pytest.raises(slimfx.SlimError):
        slimfx.compress(program, "slim", [bad])
    assert snapshot(program) == before
