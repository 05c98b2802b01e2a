"""Compressed linears become `linear_cpu` nodes: how many, in what order, and with equal answers."""

import dataclasses

import pytest
import torch
from models import KINDS, RECIPES, answer, captured, case, compressed, count, ids, tiny_llama
from slimfx.passes.base import input_specs
from slimfx.passes.decompose import slimfx_nodes
from slimfx.passes.lower_cpu import lower_cpu
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Prune, Quantize

OP = torch.ops.slimfx.linear_cpu.default


def uses(program: ExportedProgram) -> int:
    """How often a program multiplies by a compressed weight; adapters are not counted."""
    specs = input_specs(program)
    weights = {
        placeholder
        for placeholder, spec in specs.items()
        if str(spec.target).endswith((".slim_values", ".slim_codes"))
    }
    return sum(len(node.users) for node in program.graph.nodes if node.name in weights)


def same_answer(kind: str, one: ExportedProgram, other: ExportedProgram) -> bool:
    inputs = case(kind).inputs
    a, b = (answer(program.module(), inputs) for program in (one, other))
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # a bias is added last


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["slim", "slim-q", "1:4"])
def test_every_kind_of_model_answers_as_before(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    lowered, report = lower_cpu(program)
    assert report.linears == uses(program)
    assert report.left == ()
    assert slimfx_nodes(lowered) == 0
    assert count(lowered, OP) == report.ops
    assert same_answer(kind, program, lowered)


def test_neighbours_that_read_one_input_share_an_op() -> None:
    lowered, report = lower_cpu(compressed("llama", "slim-q"))
    rows = [node.args[8] for node in lowered.graph.nodes if node.target is OP]
    # k of 16 rows ends a group of q and k; v, gate and up, o and down follow
    assert rows[:5] == [[32, 16], [16], [32], [64, 64], [32]]
    assert report.ops == 10 and report.linears == 14


def test_the_stored_weights_leave_the_program() -> None:
    program = compressed("llama", "slim-q")
    before = set(program.state_dict)
    lowered, _ = lower_cpu(program)
    assert set(program.state_dict) == before
    gone = {name for name in before if ".slim_" in name}
    assert gone and not gone & set(lowered.state_dict)


def test_what_no_kernel_takes_stays_and_is_named() -> None:
    program = compressed("llama", "wanda")
    lowered, report = lower_cpu(program)
    assert report.ops == report.linears == 0
    assert len(report.left) == 14
    assert report.left[0].endswith("groups of 8 inputs, not a multiple of 16")
    assert same_answer("llama", program, lowered)


class Branches(nn.Module):
    """One input, three linears; the sum of two is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        both = self.a(x) + self.b(x)
        return self.c(both) + both.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("prune", "joined"),
    [(Prune("wanda"), 2), (None, 2), (Prune("wanda", sparsity=0.5), 3)],
    ids=["2:4", "dense", "bitmask"],
)
def test_layouts_that_join_and_one_that_does_not(prune: Prune | None, joined: int) -> None:
    model = Branches().eval()
    x = torch.randn(5, 64)
    recipe = Recipe(
        prune=prune,
        quantize=Quantize("absmax", granularity="group", group=32),
        adapter=Adapter(rank=0.2, bits=4, group=32),
    )
    program = slimfx.compress(slimfx.capture(model, (x,)), recipe, [torch.randn(128, 64)])
    lowered, report = lower_cpu(program)
    assert (report.ops, report.linears) == (joined, 3)
    torch.testing.assert_close(lowered.module()(x), program.module()(x))


def test_rounded_inputs_are_an_option() -> None:
    program = compressed("llama", "slim-q")
    lowered, _ = lower_cpu(program, rounded=True)
    inputs = case("llama").inputs
    exact, near = (answer(p.module(), inputs) for p in (program, lowered))
    error = (exact - near).norm() / exact.norm()
    assert 1e-4 < error < 0.05


def test_adapters_without_bits_keep_their_floats() -> None:
    recipe = dataclasses.replace(RECIPES["slim"], adapter=Adapter(bits=32))
    program = slimfx.compress(captured("llama"), recipe, case("llama").batches)
    lowered, report = lower_cpu(program)
    assert report.left == ()
    assert same_answer("llama", program, lowered)


@pytest.mark.parametrize("vocabulary", [96, 90])
def test_embeddings_are_looked_up_in_the_bytes_of_their_tied_head(vocabulary: int) -> None:
    program = slimfx.capture(tiny_llama(tie_word_embeddings=True, vocab_size=vocabulary).eval())
    recipe = dataclasses.replace(RECIPES["slim-q"], embeddings=8)
    small = slimfx.compress(program, recipe, ids(1, 4, 16) % vocabulary)
    lowered, _ = lower_cpu(small)
    prefix = "model.model.embed_tokens.slim_"
    assert prefix + "codes" in small.state_dict and prefix + "codes" not in lowered.state_dict
    for shape in ((1, 1), (3, 9)):
        x = {"input_ids": ids(2, *shape) % vocabulary}
        torch.testing.assert_close(
            answer(lowered.module(), x), answer(small.module(), x), rtol=1e-4, atol=1e-5
        )
    everything = {"input_ids": torch.arange(vocabulary)[None, :32]}
    torch.testing.assert_close(
        *(answer(lowered.module(), everything), answer(small.module(), everything)),
        rtol=1e-4,
        atol=1e-5,
    )
