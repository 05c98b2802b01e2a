"""round_embeddings: half the bytes, the same answers as of rounded tables, nothing else touched."""

import torch
from models import answer, captured, count, ids, tiny_llama
from slimfx.passes.base import edit
from slimfx.passes.round_embeddings import float32_tables, round_embeddings
from torch import nn

import slimfx

aten = torch.ops.aten
TABLE = "model.model.embed_tokens.weight"


def test_tables_are_bfloat16_and_answers_those_of_rounded_tables() -> None:
    program = captured("llama")
    rounded = round_embeddings(program)
    assert rounded.state_dict[TABLE].dtype is torch.bfloat16
    assert program.state_dict[TABLE].dtype is torch.float32
    assert count(rounded, aten.to.dtype) == count(program, aten.to.dtype) + 1
    change = edit(program)
    change.state_dict[TABLE] = nn.Parameter(program.state_dict[TABLE].bfloat16().float())
    expected = change.finish()
    for shape in ((1, 5), (3, 9)):
        x = {"input_ids": ids(5, *shape)}
        assert torch.equal(answer(rounded.module(), x), answer(expected.module(), x))


def test_a_table_that_is_also_the_head_stays_and_its_reader_is_named() -> None:
    program = slimfx.capture(tiny_llama(tie_word_embeddings=True).eval())
    assert float32_tables(program) == {TABLE: ("linear_14",)}
    rounded = round_embeddings(program)
    assert rounded.state_dict[TABLE] is program.state_dict[TABLE]


def test_a_lookup_that_is_an_answer() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.table(x), self.table(x + 1)

    program = torch.export.export(Lookup(), (torch.arange(3),))
    first, second = round_embeddings(program).module()(torch.arange(3))
    table = program.state_dict["table.weight"].bfloat16().float()
    assert torch.equal(first, table[:3])
    assert torch.equal(second, table[1:4])
