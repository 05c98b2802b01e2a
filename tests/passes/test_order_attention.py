"""order_attention: what torch decomposes afterwards still goes through the program's views."""

import pytest
import torch
from models import answer, captured, case, count, ids
from slimfx.passes.order_attention import order_attention

import slimfx

aten = torch.ops.aten


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decomposed_program_of_several_rows_answers_the_same(kind: str) -> None:
    program = captured(kind)
    ordered = order_attention(program)
    assert count(ordered, aten.clone.default) == count(program, aten.clone.default) + 2
    written_out = ordered.run_decompositions()
    assert count(written_out, aten.scaled_dot_product_attention.default) == 0
    for shape in ((1, 5), (3, 9)):
        x = {"input_ids": ids(5, *shape)}
        expected = answer(program.module(), x)
        assert torch.equal(answer(ordered.module(), x), expected)
        torch.testing.assert_close(answer(written_out.module(), x), expected, rtol=1e-4, atol=1e-5)


def test_one_row_has_one_order() -> None:
    program = slimfx.capture(case("gpt2").model, {"input_ids": ids(1, 1, 8)}, dynamic_shapes={})
    assert count(order_attention(program), aten.clone.default) == count(program, aten.clone.default)
