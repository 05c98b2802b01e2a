"""observe_inputs: one observation for each distinct input, and whether padding applies to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import KINDS, captured, case, normal
from slimfx.passes.find_linears import find_linears
from slimfx.passes.observe_inputs import Observation, observe_inputs
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Interpreter, Node

import slimfx


def observed(program: ExportedProgram) -> list[Observation]:
    return observe_inputs(program, tuple(find_linears(program)))


def last_parts(watch: Observation) -> list[str]:
    return [site.rpartition(".")[2] for site in watch.sites]


def test_the_linears_of_an_attention_share_one_observation() -> None:
    groups = [last_parts(watch) for watch in observed(captured("llama"))]
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups == [*layer, *layer, ["lm_head"]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_use_is_covered_once(kind: str) -> None:
    program = captured(kind)
    watched = observed(program)
    assert len({watch.node for watch in watched}) == len(watched)
    names = {site.name for site in find_linears(program)}
    assert {name for watch in watched for name in watch.sites} == names
    assert all(len(set(watch.sites)) == len(watch.sites) for watch in watched)


class Recorder(Interpreter):
    """Keeps every value of a run."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.graph_module)
        self.values: dict[Node, object] = {}

    def run_node(self, n: Node) -> object:
        self.values[n] = super().run_node(n)
        return self.values[n]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_watched_are_the_rows_that_reach_the_linear(kind: str) -> None:
    program = captured(kind)
    recorder = Recorder(program)
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    held = {**program.state_dict, **program.constants}
    arguments = [
        case(kind).inputs.get(node.name) if targets[node.name] is None else held[targets[node.name]]
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]
    with torch.no_grad():
        recorder.run(*arguments)
    watched = {(name, watch.node) for watch in observed(program) for name in watch.sites}
    for site in find_linears(program):
        nodes = [node for name, node in watched if name == site.name]
        rows = [recorder.values[node].reshape(-1, site.in_features) for node in nodes]
        for use in site.uses:
            x = recorder.values[use.x].reshape(-1, site.in_features)
            assert any(torch.equal(x, each) for each in rows if each.shape == x.shape), site.name


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_only_inputs_with_a_row_for_each_token_follow_the_mask(kind: str) -> None:
    for watch in observed(captured(kind)):
        assert watch.masked


@pytest.mark.parametrize("kind", ["llama", "vit", "mlp", "encoder layer"])
def test_without_a_mask_nothing_is_masked(kind: str) -> None:
    assert not any(watch.masked for watch in observed(captured(kind)))


class Reshaped(nn.Module):
    """Two linears of one tensor, reshaped in front of one of them."""

    def __init__(self, reshape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)
        self.b = nn.Linear(16, 8)
        self.reshape = reshape

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(x)
        return self.a(x), self.b(self.reshape(x))


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.reshape(-1, 16),
        lambda x: x.view(-1, 4, 16),
        lambda x: x.flatten(0, 1),
        lambda x: x.unsqueeze(1),
        lambda x: x.unsqueeze(0).squeeze(0),
        lambda x: x.reshape(-1, 16).unsqueeze(0).contiguous(),
    ],
)
def test_a_change_of_the_leading_shape_is_the_same_input(
    reshape: Callable[[Tensor], Tensor],
) -> None:
    program = torch.export.export(Reshaped(reshape), (normal(1, 2, 8, 16),))
    [watch] = observed(program)
    assert watch.sites == ("a", "b") and watch.node.name == "tanh"


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.reshape(2, 16, 4, 4).transpose(2, 3).reshape(2, 16, 16),
        lambda x: x.reshape(2, 8, 32)[..., :16],
        lambda x: x * 1,
        lambda x: x[:, :3],
    ],
)
def test_another_arrangement_of_the_numbers_is_another_input(
    rearrange: Callable[[Tensor], Tensor],
) -> None:
    program = torch.export.export(Reshaped(rearrange), (normal(1, 2, 16, 16),))
    assert [watch.sites for watch in observed(program)] == [("a",), ("b",)]


class Flat(nn.Module):
    """Rows of a masked batch, flattened before the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.a = nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) * attention_mask[..., None]
        return self.a(x.reshape(-1, 16))


def test_rows_that_were_flattened_still_follow_the_mask() -> None:
    inputs = {
        "input_ids": torch.ones(3, 5, dtype=torch.int64),
        "attention_mask": torch.ones(3, 5, dtype=torch.int64),
    }
    dims = {0: Dim("batch"), 1: Dim("sequence")}
    program = slimfx.capture(Flat(), inputs, dynamic_shapes=dict.fromkeys(inputs, dims))
    [watch] = observed(program)
    assert watch.masked
