"""Compressed linears become `linear_gpu` nodes: how many, in which layouts, with equal answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from models import RECIPES, answer, captured, case, compressed, count
from slimfx.passes.base import input_specs
from slimfx.passes.decompose import slimfx_nodes
from slimfx.passes.lower_gpu import lower_gpu
from slimfx.runtime.gpu_ops import OP
from slimfx.runtime.select import Gpu
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import slimfx
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Prune, Quantize
from slimfx.stored_weights import lay_out_

H100, MI300 = Gpu("cuda", 90), Gpu("hip", "gfx942")


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


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        *[(kind, "slim") for kind in ("llama", "gpt2", "mlp", "rows", "tied", "out in")],
        *[("encoder layer", "slim"), ("rows", "1:4"), ("mlp", "50%"), ("rows", "int4")],
    ],
)
def test_every_kind_of_model_answers_as_before(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    lowered, report = lower_gpu(program, H100)
    assert report.linears == uses(program) and report.left == ()
    assert slimfx_nodes(lowered) == 0
    assert count(lowered, OP) == report.ops == len(report.kernels)
    assert same_answer(kind, program, lowered)


def test_neighbours_that_read_one_input_share_an_op() -> None:
    lowered, report = lower_gpu(compressed("llama", "slim-q"), H100)
    rows = [node.args[4] for node in lowered.graph.nodes if node.target is OP]
    assert rows[:4] == [[32, 16, 16], [32], [64, 64], [32]]
    assert report.ops == 8 and report.linears == 14


class Attention(nn.Module):
    """Linears of one input, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": 64, "k": 32, "v": 32}
        self.heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads.values()], -1)


def attention(rows: Any) -> ExportedProgram:
    """It, compressed, for some rows of x: a number or a Dim."""
    torch.manual_seed(0)
    model, x = Attention().eval().bfloat16(), torch.randn(3, 128).bfloat16()
    program = slimfx.capture(model, (x,), dynamic_shapes=({0: rows},))
    recipe = Recipe(
        prune=Prune("magnitude"),
        quantize=Quantize("absmax"),
        adapter=Adapter("naive", rank=0.3, bits=4, group=32),
    )
    return slimfx.compress(program, recipe, [torch.randn(64, 128).bfloat16()])


def layouts(program: ExportedProgram) -> list[tuple[bool, bool]]:
    """Of each op: has it fragments, and the other layout?"""
    nodes = [node for node in program.graph.nodes if node.target is OP]
    return [(bool(node.args[1]), bool(node.args[2])) for node in nodes]


@pytest.mark.parametrize(
    ("most", "gpu", "made", "kernels"),
    [
        (16, H100, (True, False), ["decode_24"]),
        (4096, H100, (True, True), ["decode_24", "portable_24", "expand"]),
        (150, MI300, (False, True), ["portable_24"]),
    ],
)
def test_only_the_layouts_that_are_read_are_made(
    most: int, gpu: Gpu, made: tuple[bool, bool], kernels: list[str]
) -> None:
    program = attention(Dim("rows", min=1, max=most))
    lowered, report = lower_gpu(program, gpu)
    assert (report.ops, report.linears, report.left) == (1, 3, ())
    assert layouts(lowered) == [made]
    [choices] = report.kernels.values()
    assert [choice.kernel for choice in choices] == kernels
    assert choices[-1].rows[1] == most
    x = torch.randn(5, 128).bfloat16()
    want, got = (p.module()(x).float() for p in (program, lowered))
    torch.testing.assert_close(got, want, rtol=2**-6, atol=0.05)


def test_fewer_rows_than_the_program_allows() -> None:
    lowered, _ = lower_gpu(attention(Dim("rows", min=1, max=4096)), H100, rows=(1, 1))
    assert layouts(lowered) == [(True, False)]


def test_the_stored_weights_leave_the_program_and_it_can_be_saved(tmp_path: Any) -> None:
    program = compressed("llama", "slim-q")
    before = set(program.state_dict)
    lowered, _ = lower_gpu(program, H100)
    assert set(program.state_dict) == before
    gone = {name for name in before if ".slim_" in name}
    assert gone and not gone & set(lowered.state_dict)
    torch.export.save(lowered, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2")
    assert same_answer("llama", lowered, again)


def test_what_no_kernel_takes_stays_and_is_named() -> None:
    program = slimfx.compress(
        slimfx.capture(nn.Linear(32, 8).double().eval(), (torch.randn(2, 32).double(),)),
        dataclasses.replace(RECIPES["slim"], adapter=None),
        [torch.randn(64, 32).double()],
    )
    lowered, report = lower_gpu(program, H100)
    assert report.ops == report.linears == 0 and len(report.left) == 1
    assert "no kernel for 2 or more rows of x: decode_24: x is torch.float64" in report.left[0]
    x = torch.randn(2, 32).double()
    assert torch.equal(lowered.module()(x), program.module()(x))


def test_adapters_without_bits_keep_their_floats() -> None:
    recipe = dataclasses.replace(RECIPES["slim"], adapter=Adapter(bits=32))
    program = slimfx.compress(captured("llama"), recipe, case("llama").batches)
    lowered, report = lower_gpu(program, H100)
    assert report.left == ()
    assert same_answer("llama", program, lowered)


@torch.no_grad()
def test_graphs_of_dynamo_share_what_was_laid_out() -> None:
    program = attention(Dim("rows", min=1, max=4096))
    module, x = program.module(), torch.randn(5, 128).bfloat16()
    reports, tensors = [], []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        report, marks = lay_out_(gm, inputs, rounded=False, gpu=H100)
        assert marks and all(mark.fits(mark.tensor()) for mark in marks)
        reports.append(report)
        tensors.append(dict(gm.named_buffers()))
        return gm

    torch._dynamo.reset()
    run = torch.compile(module, backend=backend, dynamic=False)
    for rows in (5, 7, 100):
        y = run(x[:1].expand(rows, -1))
        want = module(x[:1].expand(rows, -1))
        torch.testing.assert_close(y.float(), want.float(), rtol=2**-6, atol=0.05)
    assert [(report.ops, report.linears) for report in reports] == [(1, 3)] * 3
    kernels = [[each.kernel for each in k] for r in reports for k in r.kernels.values()]
    assert kernels == [["decode_24"], ["decode_24"], ["portable_24"]]
    held = [{t.data_ptr() for t in each.values()} for each in tensors]
    made = [{p for p in held[i] if i == 0 or p not in held[i - 1]} for i in range(3)]
    assert held[0] and not made[1] and made[2]
