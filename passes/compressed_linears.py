"""The compressed linears of a graph, each with the adapters added to it: what `lower_cpu` and
`lower_gpu` replace.

    y = linear_24(x, ...) [+ b] + linear_int(linear_int(x, L), R)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import slimfx.runtime.ops  # noqa: F401  the ops must exist before their overloads are named
import torch
from slimfx.passes.base import Edit
from slimfx.passes.find_linears import PREFIX
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedMatrix, row_count
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
ops = torch.ops.slimfx
_STORED: dict[Any, tuple[Any, int]] = {
    ops.linear_int.default: (PackedDense, 2),
    ops.linear_24.default: (Packed24, 3),
    ops.linear_bitmask.default: (PackedBitmask, 3),
}
"""Op -> the matrix it multiplies by, and how many tensors that has."""
_ADDS = (aten.add.Tensor, torch.add)
_LINEARS = (aten.linear.default, torch.nn.functional.linear)
_CASTS = (aten.to.dtype, aten._to_copy.default)

Sized = tuple[PackedMatrix | Tensor, int]
"""A stored matrix [N, K] and its K."""
Read = Callable[[Node], Tensor | None]
"""The tensor behind a placeholder or attribute, None for what the caller passes."""
Renamed = Callable[[str, str], None]
"""Told the old and new name of every result."""


@dataclass(frozen=True)
class CompressedLinear:
    """A compressed linear: node `base` multiplies by the weight, `total` adds the adapters."""

    base: Node
    total: Node | None
    x: Node
    weight: PackedMatrix
    N: int
    L: PackedMatrix | Tensor | None = None
    R: PackedMatrix | Tensor | None = None
    rank: int = 0

    def matrices(self) -> list[Sized]:
        """The weight, then L and R if it has them."""
        K = int(value_of(self.x).shape[-1])
        sized = ((self.weight, K), (self.L, K), (self.R, self.rank))
        return [(matrix, width) for matrix, width in sized if matrix is not None]


def compressed_linears(graph: Graph, read: Read) -> list[CompressedLinear]:
    """Every compressed linear, with the adapters added to it."""
    found: dict[Node, CompressedLinear] = {}
    adapters: set[Node] = set()
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if node.target not in _ADDS or not isinstance(node.args[1], Node):
            continue
        linear = _with_adapters(node, read)
        if linear is not None:
            found[linear.base] = linear
            second: Any = node.args[1]
            adapters |= {second, second.args[0]}
    for node in nodes:
        if node.target in _STORED and node not in found and node not in adapters:
            weight = _matrix(node, read)
            if weight is not None:
                found[node] = CompressedLinear(node, None, node.args[0], weight, row_count(weight))
    order = {node: i for i, node in enumerate(nodes)}
    return sorted(found.values(), key=lambda linear: order[linear.base])


def _with_adapters(total: Any, read: Read) -> CompressedLinear | None:
    """`total` as weight [+ bias] + second(first(x)), if it is that."""
    left, second = total.args[:2]
    base: Any = left.args[0] if isinstance(left, Node) and left.target in _ADDS else left
    first: Any = second.args[0] if isinstance(second, Node) and second.args else None
    if not all(isinstance(node, Node) for node in (base, first)):
        return None
    if base.target not in _STORED or not first.args or base.args[0] is not first.args[0]:
        return None
    if any(len(node.users) > 1 for node in (base, left, first, second)):
        return None
    weight, L, R = (_matrix(node, read) for node in (base, first, second))
    if weight is None or L is None or R is None or isinstance(weight, Tensor):
        return None
    return CompressedLinear(
        base, total, base.args[0], weight, row_count(weight), L, R, row_count(L)
    )


def _matrix(node: Any, read: Read) -> Any:
    """The stored matrix that a node multiplies by, or None."""
    if node.target in _LINEARS:
        weight = node.args[1]
        if isinstance(weight, Node) and weight.target in _CASTS:
            weight = weight.args[0]
        return read(weight) if isinstance(weight, Node) and len(node.args) == 2 else None
    if node.target not in _STORED:
        return None
    kind, count = _STORED[node.target]
    tensors = [None if arg is None else read(arg) for arg in node.args[1 : 1 + count]]
    if any(arg is not None and got is None for arg, got in zip(node.args[1:], tensors)):
        return None
    return kind(*tensors, *node.args[1 + count :])


def call(graph: Graph, like: Node, op: Any, *args: Any) -> Node:
    """A new node, with what is known of `like` but its value."""
    node = graph.call_function(op, args)
    node.meta = {k: v for k, v in like.meta.items() if k not in ("val", "example_value")}
    key = "val" if "val" in like.meta else "example_value"
    values = map_arg(args, value_of)
    with value_of(like).fake_mode:
        node.meta[key] = op(*values)
    return node


def value_of(node: Node) -> Any:
    """The fake tensor of a node, in exported programs and Dynamo's graphs."""
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def split_output(
    graph: Graph, linears: Sequence[CompressedLinear], y: Node
) -> Iterator[tuple[Node, Node]]:
    """What takes the place of what, when one node gives the outputs of several linears."""
    base, start = linears[0].base, 0
    for linear in linears:
        part = y
        if len(linears) > 1:
            part = call(graph, base, aten.slice.Tensor, y, -1, start, start + linear.N)
        start += linear.N
        yield linear.base, part
        if linear.total is not None:
            yield linear.total, linear.total.args[0]  # type: ignore[misc]


def drop_read_buffers_(change: Edit, specs: dict[str, Any]) -> None:
    """Forget the canonical weights that no node reads any more."""
    unread = {
        node.name: node
        for node in change.graph.nodes
        if node.name in specs and not node.users and f".{PREFIX}" in str(specs[node.name].target)
    }
    for name, node in unread.items():
        del change.state_dict[str(specs[name].target)]
        change.graph.erase_node(node)
    change.signature.input_specs[:] = [
        spec
        for spec in change.signature.input_specs
        if spec.arg.name not in unread  # type: ignore[union-attr]
    ]
