"""Fix the memory order of what attention answers, for runtimes that write attention out.

    y = scaled_dot_product_attention(q, k, v)                     [rows, heads, length, width]

becomes the same values in the order that torch's own kernel leaves them in,

    y' = transpose(clone(transpose(y, 1, 2)), 1, 2)

torch's decomposition of y leaves several rows in another order, over which GPT-2, captured with the
kernel's, can take no view: "Cannot view a tensor with shape ...".
"""

from __future__ import annotations

from typing import Any

import torch
from slimfx.passes.base import edit, fake_mode
from torch.export import ExportedProgram
from torch.fx import Graph, Node, map_arg

aten = torch.ops.aten
_BY_ROWS = torch.contiguous_format


def order_attention(program: ExportedProgram) -> ExportedProgram:
    """The program, whose answers stay as they are, with the order of each attention fixed; one row
    has no other.
    """
    change = edit(program)
    graph = change.graph
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        if node.meta["val"].dim() == 4 and node.meta["val"].shape[0] != 1:
            _order(graph, node)
    return change.finish()


def _order(graph: Graph, node: Node) -> None:
    users = list(node.users)
    with graph.inserting_before(node.next):
        turned = _call(node, aten.transpose.int, (node, 1, 2), {})
        copied = _call(node, aten.clone.default, (turned,), {"memory_format": _BY_ROWS})
        ordered = _call(node, aten.transpose.int, (copied, 1, 2), {})
    for user in users:
        user.replace_input_with(node, ordered)


def _call(like: Node, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
    """A node with the metadata of another one, but for its value."""
    made = like.graph.call_function(op, args, kwargs)
    with fake_mode(like.graph):
        value = op(*map_arg(args, lambda arg: arg.meta["val"]), **kwargs)
    made.meta = {**like.meta, "val": value}
    return made
