"""Store embedding tables in fewer bits.

    y = embedding(table, ids)        becomes        to(embedding(bfloat16(table), ids), float32)
                                     or             (to(codes[ids]) - 128) * to(scale[ids])

A linear that multiplies with the same table, as a tied head does, multiplies with the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from slimfx.passes.base import Edit, add_buffer, edit, fake_mode, input_specs, lifted_tensor
from slimfx.passes.find_linears import PREFIX, storage_key
from slimfx.runtime.pack import PackedDense
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Table:
    """A floating-point parameter [rows, width] that rows are looked up in."""

    fqn: str
    shape: tuple[int, int]
    dtype: torch.dtype
    heads: tuple[str, ...]
    """The linears that multiply with it."""
    others: tuple[str, ...]
    """What else reads it, which nothing but floats can serve."""


def find_tables(program: ExportedProgram) -> list[Table]:
    """Every table, its aliases under the first name."""
    return [
        Table(
            fqn,
            tuple(program.state_dict[fqn].shape),  # type: ignore[arg-type]
            program.state_dict[fqn].dtype,
            tuple(user.name for user in users if _is_head(user)),
            tuple(user.name for user in users if not (_is_lookup(user) or _is_head(user))),
        )
        for fqn, nodes in _parameters(program).items()
        if any(map(_is_lookup, users := [user for node in nodes for user in node.users]))
        and program.state_dict[fqn].is_floating_point()
    ]


def replace_tables(
    program: ExportedProgram, stored: Mapping[str, PackedDense | Tensor]
) -> ExportedProgram:
    """The program with other forms of its tables: codes of eight bits with a scale for each row, or
    floats of another dtype, which lookups alone read.
    """
    change = edit(program)
    own = {node.name: node for node in change.graph.nodes if node.op == "placeholder"}
    for fqn, nodes in _parameters(program).items():
        if fqn in stored:
            _replace(change, fqn, [own[node.name] for node in nodes], stored[fqn])
    return change.finish()


def _parameters(program: ExportedProgram) -> dict[str, list[Node]]:
    """The placeholders of each parameter, those of one storage together."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    first: dict[tuple, str] = {}
    found: dict[str, list[Node]] = {}
    for name, spec in input_specs(program).items():
        fqn = str(spec.target)
        if fqn in program.state_dict:
            key = storage_key(lifted_tensor(program, spec), fqn)
            found.setdefault(first.setdefault(key, fqn), []).append(nodes[name])
    return found


def _is_lookup(node: Node) -> bool:
    return node.target is aten.embedding.default


def _is_head(node: Node) -> bool:
    return node.target is aten.linear.default and node.args[1].op == "placeholder"  # type: ignore[union-attr]


def _replace(change: Edit, fqn: str, nodes: list[Node], matrix: PackedDense | Tensor) -> None:
    prefix = f"{fqn.removesuffix('.weight')}.{PREFIX}"
    if isinstance(matrix, Tensor):
        parts = [add_buffer(change, f"{prefix}table", matrix)]
    else:
        assert matrix.scale is not None
        parts = [
            add_buffer(change, f"{prefix}codes", matrix.codes),
            add_buffer(change, f"{prefix}scale", matrix.scale),
        ]
    for user in [user for node in nodes for user in node.users]:
        with change.graph.inserting_before(user):
            if isinstance(matrix, Tensor):
                new = _looked_up(user, *parts)
            elif _is_lookup(user):
                new = _coded(user, *parts)
            else:
                new = _multiplied(user, matrix, *parts)
        user.replace_all_uses_with(new)
        change.signature.replace_all_uses(user.name, new.name)
        change.graph.erase_node(user)
    names = {node.name for node in nodes}
    for spec in [s for s in change.signature.input_specs if s.arg.name in names]:  # type: ignore[union-attr]
        change.signature.input_specs.remove(spec)
        del change.state_dict[str(spec.target)]
    for node in nodes:
        change.graph.erase_node(node)


def _looked_up(old: Node, table: Node) -> Node:
    found = _call(old, aten.embedding.default, table, *old.args[1:])
    return _call(old, aten.to.dtype, found, old.meta["val"].dtype)


def _coded(old: Node, codes: Node, scale: Node) -> Node:
    ids, dtype = old.args[1], old.meta["val"].dtype
    found = _call(old, aten.to.dtype, _call(old, aten.index.Tensor, codes, [ids]), dtype)
    steps = _call(old, aten.to.dtype, _call(old, aten.index.Tensor, scale, [ids]), dtype)
    return _call(old, aten.mul.Tensor, _call(old, aten.sub.Tensor, found, 128), steps)


def _multiplied(old: Node, matrix: PackedDense, codes: Node, scale: Node) -> Node:
    x, _, bias = (*old.args, None)[:3]
    op = torch.ops.slimfx.linear_int.default
    y = _call(old, op, x, codes, scale, matrix.bits, matrix.group)
    return y if bias is None else _call(old, aten.add.Tensor, y, bias)


def _call(like: Node, op: Any, *args: Any) -> Node:
    """A node whose metadata is the replaced node's, but for the value it really has."""
    node = like.graph.call_function(op, args)
    node.meta = dict(like.meta)
    with fake_mode(like.graph):
        node.meta["val"] = op(*torch.fx.node.map_arg(args, lambda arg: arg.meta["val"]))
    return node
