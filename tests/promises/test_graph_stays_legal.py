"""Promise 15: what compress returns is a legal program, with the ranges and outputs it had."""

from __future__ import annotations

import pytest
from models import KINDS, captured, compressed
from torch.export import ExportedProgram


def outputs(program: ExportedProgram) -> list[str]:
    return [str(spec.kind) for spec in program.graph_signature.output_specs]


@pytest.mark.parametrize("kind", KINDS)
def test_graph_stays_legal(kind: str) -> None:
    before, after = captured(kind), compressed(kind, "slim-q")
    after.graph.lint()
    after.validate()
    assert str(after.range_constraints) == str(before.range_constraints)
    assert outputs(after) == outputs(before)
    assert after.call_spec == before.call_spec
