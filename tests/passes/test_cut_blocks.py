"""cut_blocks: every node in exactly one block, in order, with what later blocks still read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import KINDS, Chain, answer, bits, captured, case, normal
from slimfx.passes.cut_blocks import Block, cut_blocks
from slimfx.passes.find_linears import find_linears
from slimfx.passes.observe_inputs import observe_inputs
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx import calibrate


def cut(program: ExportedProgram) -> list[Block]:
    return cut_blocks(program, find_linears(program))


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_hold_every_node_once_and_in_order(kind: str) -> None:
    program = captured(kind)
    inside = [node for block in cut(program) for node in block.nodes]
    assert inside == [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    assert all(block.nodes for block in cut(program))


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_solved_in_one_block_that_holds_all_its_uses(kind: str) -> None:
    program = captured(kind)
    sites, blocks = find_linears(program), cut(program)
    assert [site.name for block in blocks for site in block.sites] == [s.name for s in sites]
    for block in blocks:
        for site in block.sites:
            assert {use.node for use in site.uses} <= set(block.nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_later_blocks_read_is_live_and_nothing_else_is(kind: str) -> None:
    program = captured(kind)
    order = list(program.graph.nodes)
    for block in cut(program):
        end = order.index(block.nodes[-1])
        earlier, later = order[: end + 1], set(order[end + 1 :])
        assert block.live_out == {node for node in earlier if later & set(node.users)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_is_observed_behind_its_last_watched_input(kind: str) -> None:
    program = captured(kind)
    for block in cut(program):
        if watched := observe_inputs(program, block.sites, set(block.nodes)):
            inside = calibrate.observed(block, watched).nodes
            nodes = {watch.node for watch in watched} & set(block.nodes)
            assert nodes <= set(inside) < set(block.nodes)
            assert not nodes or inside[-1] in nodes


@pytest.mark.parametrize("kind", KINDS)
def test_walking_block_by_block_gives_the_output_of_the_whole(kind: str) -> None:
    program, inputs = captured(kind), case(kind).inputs
    walk = calibrate.start(program, [inputs])
    for block in cut(program):
        walk = replace(walk, batches=dict(calibrate.advance(walk, block, {})))
    [output] = next(n for n in program.graph.nodes if n.op == "output").args[0]
    [values] = walk.batches.values()
    assert bits(values[output]) == bits(program.module()(**inputs))
    torch.testing.assert_close(
        values[output], answer(case(kind).model, inputs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["", "model.model.layers.0", "model.model.layers.1", ""]),
        ("gpt2", ["", "model.transformer.h.0", "model.transformer.h.1", ""]),
        ("bert", ["", "model.encoder.layer.0", "model.encoder.layer.1"]),
        ("vit", ["", "model.vit.layers.0", "model.vit.layers.1", ""]),
        ("albert", ["", "model.encoder.albert_layer_groups.0"]),
        ("mlp", [""]),
        ("encoder layer", [""]),
    ],
)
def test_the_blocks_are_the_members_of_the_numbered_container(kind: str, names: list[str]) -> None:
    assert [block.name for block in cut(captured(kind))] == names


class Numbered(Chain):
    """Linears with a ReLU between them, some over one weight: equal letters share."""

    def __init__(self, pattern: str) -> None:
        super().__init__(*(nn.Linear(16, 16) for _ in pattern))
        for i, letter in enumerate(pattern):
            self.layers[i].weight = self.layers[pattern.index(letter)].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize(
    ("pattern", "together"),
    [
        ("abc", ["a", "b", "c"]),
        ("aab", ["aa", "b"]),
        ("abac", ["aba", "c"]),
        ("abcb", ["a", "bcb"]),
        ("abcabd", ["abcab", "d"]),
        ("abacbd", ["abacb", "d"]),
        ("abcda", ["abcda"]),
        ("aabb", ["aa", "bb"]),
    ],
)
def test_blocks_that_share_a_weight_are_joined_with_all_between(
    pattern: str, together: list[str]
) -> None:
    program = slimfx.capture(Numbered(pattern), (normal(1, 4, 16),))
    blocks = [block for block in cut(program) if block.sites]
    letters = [
        "".join(
            pattern[int(path.split(".")[1])]
            for node in block.nodes
            if str(node.target) == "aten.linear.default"
            for path in [next(reversed(node.meta["nn_module_stack"].values()))[0]]
        )
        for block in blocks
    ]
    assert letters == together


def test_a_step_outside_the_container_does_not_cut_a_member_in_two() -> None:
    program = slimfx.capture(Detour(), (normal(1, 4, 16),))
    blocks = [block for block in cut(program) if block.sites]
    assert [[site.name for site in block.sites] for block in blocks] == [
        ["layers.0.left", "layers.0.right"],
        ["layers.1"],
    ]


class Half(nn.Module):
    """Two linears, called one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(16, 16)
        self.right = nn.Linear(16, 16)


class Detour(nn.Module):
    """A sine in the root between two calls into the first member."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Half(), nn.Linear(16, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0].left(x)
        return self.layers[1](self.layers[0].right(x.sin()))


def test_a_value_that_skips_blocks_stays_live_until_its_last_reader() -> None:
    program = slimfx.capture(LongSkip(), (normal(1, 4, 16),))
    blocks = cut(program)
    skip = next(node for node in program.graph.nodes if node.name.startswith("tanh"))
    held = [skip in block.live_out for block in blocks]
    assert held == [True, True, True, True, False]


class LongSkip(Chain):
    """The input's tanh is added after the last of three layers."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(16, 16) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        start = torch.tanh(x)
        return super().forward(start) + start
