"""Store embedding tables in bfloat16; what is looked up is made float32 again.

y = embedding(table, ids)        becomes        y = to(embedding(bfloat16(table), ids), float32)
"""

from __future__ import annotations

import torch
from slimfx.passes.base import Edit, edit, fake_mode, input_specs, lifted_tensor
from slimfx.passes.find_linears import storage_key
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten


def float32_tables(program: ExportedProgram) -> dict[str, tuple[str, ...]]:
    """The float32 weights that are looked up in -> the other nodes that read them: where there are
    any, the weight cannot be rounded.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    readers: dict[tuple, list[Node]] = {}
    names: dict[tuple, str] = {}
    for name, spec in input_specs(program).items():
        fqn = str(spec.target)
        if fqn not in program.state_dict:
            continue
        key = storage_key(lifted_tensor(program, spec), fqn)
        readers.setdefault(key, []).extend(nodes[name].users)
        names.setdefault(key, fqn)
    return {
        names[key]: tuple(user.name for user in users if user.target is not aten.embedding.default)
        for key, users in readers.items()
        if program.state_dict[names[key]].dtype is torch.float32
        and any(user.target is aten.embedding.default for user in users)
    }


def round_embeddings(program: ExportedProgram) -> ExportedProgram:
    """The program with its float32 tables in bfloat16, those left out that anything else reads."""
    chosen = {fqn for fqn, others in float32_tables(program).items() if not others}
    change = edit(program)
    nodes = {node.name: node for node in change.graph.nodes if node.op == "placeholder"}
    for name, spec in input_specs(program).items():
        if spec.target in chosen:
            _round(change, nodes[name])
            fqn = str(spec.target)
            change.state_dict[fqn] = torch.nn.Parameter(
                change.state_dict[fqn].detach().to(torch.bfloat16), requires_grad=False
            )
    return change.finish()


def _round(change: Edit, table: Node) -> None:
    graph = change.graph
    with fake_mode(graph):
        table.meta = {**table.meta, "val": table.meta["val"].to(torch.bfloat16)}
    for looked_up in list(table.users):
        readers = list(looked_up.users)
        with graph.inserting_after(looked_up):
            widened = graph.call_function(aten.to.dtype, (looked_up, torch.float32))
        widened.meta = dict(looked_up.meta)
        with fake_mode(graph):
            looked_up.meta = {**looked_up.meta, "val": widened.meta["val"].to(torch.bfloat16)}
        for reader in readers:
            reader.replace_input_with(looked_up, widened)
        change.signature.replace_all_uses(looked_up.name, widened.name)
