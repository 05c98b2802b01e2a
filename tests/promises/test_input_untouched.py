"""Promise 8: the program that is compressed is read and not written."""

from __future__ import annotations

from typing import Any

from models import RECIPES, bits, case
from torch.export import ExportedProgram

import slimfx


def content(program: ExportedProgram) -> Any:
    """The graph, the signature, and bytes and places of all tensors."""
    tensors = {name: (t.data_ptr(), bits(t)) for name, t in program.state_dict.items()}
    return str(program.graph), str(program.graph_signature), tensors


def test_input_untouched() -> None:
    made = case("encoder layer")
    program = slimfx.capture(made.model, made.inputs)
    before = content(program)
    slimfx.compress(program, RECIPES["slim-q"], made.batches)
    assert content(program) == before
