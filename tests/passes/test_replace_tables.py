"""replace_tables: fewer bytes, the answers of the rounded table, nothing else touched."""

import torch
from models import answer, captured, count, ids, tiny_llama
from slimfx.passes.base import edit
from slimfx.passes.replace_tables import find_tables, replace_tables
from slimfx.runtime.pack import PackedDense, pack_codes
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx

aten = torch.ops.aten
TABLE = "model.model.embed_tokens.weight"


def coded(rows: int, width: int) -> tuple[PackedDense, Tensor]:
    """A random table as codes, and as the floats these stand for."""
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (rows, width), generator=draw).to(torch.int8)
    scale = torch.rand(rows, 1, generator=draw).div(127).to(torch.bfloat16)
    return PackedDense(pack_codes(codes, 8), scale, 8, width), codes.float() * scale.float()


def with_table(program: ExportedProgram, table: Tensor, *names: str) -> ExportedProgram:
    change = edit(program)
    for name in names:
        change.state_dict[name] = nn.Parameter(table)
    return change.finish()


def test_bfloat16_tables_answer_as_rounded_ones() -> None:
    program = captured("llama")
    table = program.state_dict[TABLE].detach().bfloat16()
    rounded = replace_tables(program, {TABLE: table})
    assert TABLE in program.state_dict and TABLE not in rounded.state_dict
    assert count(rounded, aten.to.dtype) == count(program, aten.to.dtype) + 1
    expected = with_table(program, table.float(), TABLE)
    for shape in ((1, 5), (3, 9)):
        x = {"input_ids": ids(5, *shape)}
        assert torch.equal(answer(rounded.module(), x), answer(expected.module(), x))


def test_a_tied_head_multiplies_with_the_codes_of_the_table() -> None:
    program = slimfx.capture(tiny_llama(tie_word_embeddings=True).eval())
    (found,) = find_tables(program)
    assert (found.fqn, found.heads, found.others) == (TABLE, ("linear_14",), ())
    packed, table = coded(*found.shape)
    small = replace_tables(program, {TABLE: packed})
    assert not any("lm_head" in name or name == TABLE for name in small.state_dict)
    assert count(small, torch.ops.slimfx.linear_int.default) == 1
    expected = with_table(program, table, TABLE, "model.lm_head.weight")
    for shape in ((1, 5), (3, 9)):
        x = {"input_ids": ids(5, *shape)}
        torch.testing.assert_close(answer(small.module(), x), answer(expected.module(), x))


class Lookup(nn.Module):
    """A table that is looked up twice, once for an answer; one that is also added to."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.read = nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.table(x), self.table(x + 1) + self.read(x) + self.read.weight.sum()


def test_lookups_that_are_answers_and_tables_that_something_else_reads() -> None:
    program = torch.export.export(Lookup(), (torch.arange(3),))
    table, read = find_tables(program)
    assert (table.others, read.others) == ((), ("sum_1",))
    packed, floats = coded(10, 4)
    found = replace_tables(program, {"table.weight": packed}).module()(torch.arange(3))
    expected = with_table(program, floats, "table.weight").module()(torch.arange(3))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)
