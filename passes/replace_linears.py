"""Replace linears by their compressed form, in a copy of the program.

    y = aten.linear(x, W, b)

becomes

    y = slimfx.linear_24(x, values, indices, scale) [+ b] [+ second(first(x, L), R)]

with `first` and `second` aten.linear or slimfx.linear_int4. The float weights leave the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import slimfx.runtime.ops  # noqa: F401  the ops must exist before their overloads are named
import torch
from slimfx.passes.base import Edit, edit, fake_mode
from slimfx.passes.find_linears import PREFIX, Site, Use, storage_key
from slimfx.runtime.pack import Packed24, PackedInt4, PackedLinear
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

aten = torch.ops.aten


def replace_linears(
    program: ExportedProgram, sites: list[Site], packed: Mapping[str, PackedLinear]
) -> ExportedProgram:
    """A program in which every site named in `packed` is compressed; the given one is unchanged."""
    change = edit(program)
    copies = {node.name: node for node in change.graph.nodes}
    for site in sites:
        if site.name in packed:
            placeholders = _Placeholders(change, site.fqn)
            for use in site.uses:
                _replace(
                    change, _copied(use, copies[use.node.name]), packed[site.name], placeholders
                )
    _drop_weights(change, [site.fqn for site in sites if site.name in packed])
    return change.finish()


class _Placeholders:
    """Lifted buffers of one site, made on first use and shared by all its uses."""

    def __init__(self, change: Edit, fqn: str) -> None:
        self.change = change
        self.prefix = f"{fqn.removesuffix('.weight')}.{PREFIX}"
        self.made: dict[str, Node] = {}

    def get(self, name: str, tensor: Tensor) -> Node:
        if name in self.made:
            return self.made[name]
        graph, signature = self.change.graph, self.change.signature
        user_inputs = {
            spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT
        }
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        first = next((node for node in inputs if node.name in user_inputs), inputs[-1].next)
        fqn = self.prefix + name
        with graph.inserting_before(first):
            node = graph.placeholder("b_" + fqn.replace(".", "_").lower())
        node.target = node.name  # made unique where two names differ in case or dots alone
        node.meta["val"] = fake_mode(graph).from_tensor(tensor, static_shapes=True)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), fqn, persistent=True)
        signature.input_specs.append(spec)
        self.change.state_dict[fqn] = tensor
        self.made[name] = node
        return node


def _copied(use: Use, node: Node) -> Use:
    """The same use in the copy, where an earlier replacement may already have made its input."""
    arguments = list(use.node.args)
    x = node.args[arguments.index(use.x)]
    bias = None if use.bias is None else node.args[arguments.index(use.bias)]
    return Use(node, x, bias)  # type: ignore[arg-type]


def _replace(change: Edit, use: Use, packed: PackedLinear, placeholders: _Placeholders) -> None:
    with change.graph.inserting_before(use.node):
        y = _multiply(use, use.x, "", packed.weight, placeholders)
        if use.bias is not None:
            y = _call(use, aten.add.Tensor, y, use.bias)
        if packed.L is not None and packed.R is not None:
            hidden = _multiply(use, use.x, "L", packed.L, placeholders)
            y = _call(use, aten.add.Tensor, y, _multiply(use, hidden, "R", packed.R, placeholders))
    use.node.replace_all_uses_with(y)
    change.signature.replace_all_uses(use.node.name, y.name)
    change.graph.erase_node(use.node)


def _multiply(
    use: Use,
    x: Node,
    name: str,
    matrix: Packed24 | PackedInt4 | Tensor,
    placeholders: _Placeholders,
) -> Node:
    """x times the transpose of a stored matrix, as one node (two where it is stored in another
    dtype).
    """
    prefix = f"{name}_" if name else ""
    if isinstance(matrix, Packed24):
        parts = [
            placeholders.get(prefix + part, getattr(matrix, part))
            for part in ("values", "indices", "scale")
        ]
        return _call(use, torch.ops.slimfx.linear_24.default, x, *parts)
    if isinstance(matrix, PackedInt4):
        parts = [
            placeholders.get(prefix + part, getattr(matrix, part)) for part in ("codes", "scale")
        ]
        return _call(use, torch.ops.slimfx.linear_int4.default, x, *parts, matrix.group)
    weight = placeholders.get(name, matrix)
    if matrix.dtype != x.meta["val"].dtype:
        weight = _call(use, aten.to.dtype, weight, x.meta["val"].dtype)
    return _call(use, aten.linear.default, x, weight)


def _call(use: Use, op: Any, *args: Any) -> Node:
    """A node whose metadata is the replaced node's, but for the value it really has."""
    node = use.node.graph.call_function(op, args)
    node.meta = dict(use.node.meta)
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    with fake_mode(use.node.graph):
        node.meta["val"] = op(*values)
    return node


def _drop_weights(change: Edit, fqns: list[str]) -> None:
    """Erase the placeholders nobody reads any more that hold a replaced weight, aliases
    included.
    """
    replaced = {storage_key(change.state_dict[fqn], fqn) for fqn in fqns}
    nodes = {node.name: node for node in change.graph.nodes if node.op == "placeholder"}
    kept = []
    for spec in change.signature.input_specs:
        fqn, node = spec.target or "", nodes[spec.arg.name]  # type: ignore[union-attr]
        if fqn not in change.state_dict or storage_key(change.state_dict[fqn], fqn) not in replaced:
            kept.append(spec)
            continue
        for transpose in [user for user in node.users if not user.users]:
            change.graph.erase_node(transpose)
        if node.users:
            kept.append(spec)
        else:
            change.graph.erase_node(node)
            del change.state_dict[fqn]
    change.signature.input_specs[:] = kept
