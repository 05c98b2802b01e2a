"""Drop what no output depends on, such as the pooler behind an encoder's hidden state."""

from __future__ import annotations

from slimfx.passes.base import edit
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind


def drop_unused(program: ExportedProgram) -> ExportedProgram:
    """A program without dead nodes, and without the parameters that only they read.

    A parameter that no node ever read stays: it is the other name of one that is tied to it.
    """
    change = edit(program)
    read = {node.name for node in change.graph.nodes if node.users}
    change.graph.eliminate_dead_code()
    nodes = {node.name: node for node in change.graph.nodes if node.op == "placeholder"}
    kept = []
    for spec in change.signature.input_specs:
        node = nodes[spec.arg.name]  # type: ignore[union-attr]
        if spec.kind is InputKind.PARAMETER and node.name in read and not node.users:
            change.graph.erase_node(node)
            del change.state_dict[str(spec.target)]
        else:
            kept.append(spec)
    change.signature.input_specs[:] = kept
    return change.finish()
