"""Write slimfx's ops out in plain ATen, so that a program runs wherever torch does."""

from __future__ import annotations

import warnings

from slimfx.passes.base import edit
from slimfx.runtime.ops import REFERENCES
from torch.export import ExportedProgram


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The same program without slimfx ops; everything else is left as it was."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`isinstance\\(treespec, LeafSpec", FutureWarning
        )  # torch's
        written_out = program.run_decompositions(REFERENCES)  # type: ignore[arg-type]
    return edit(written_out).finish()  # drops the symbols that tracing left behind


def slimfx_nodes(program: ExportedProgram) -> int:
    """How many nodes call an op of slimfx."""
    return sum(node.target in REFERENCES for node in program.graph.nodes)
