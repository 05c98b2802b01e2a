"""Turn each compressed linear, its adapters included, into one op that a CPU kernel runs.

    y = linear_24(x, ...) [+ b] + linear_int(linear_int(x, L), R)
    k = linear_24(x, ...) [+ c] + linear_int(linear_int(x, M), S)

becomes

    both = linear_cpu(x, [W; V], [L; M], [R, S])
    y, k = both[:n] [+ b], both[n:] [+ c]

Linears that read the same x join where their numbers are stored alike and the rows of all but the
last are a multiple of 32. The weights are laid out anew for the kernels, here and once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import slimfx.runtime.cpu_ops
import slimfx.runtime.ops  # noqa: F401  the ops must exist before their overloads are named
import torch
from slimfx.passes.base import Edit, add_buffer, edit, input_specs, lifted_tensor
from slimfx.passes.find_linears import PREFIX
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.interleave import form_of, interleave, whole, why_not
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedMatrix
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

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
_JOIN = 32


@dataclass(frozen=True)
class Lowered:
    """What became of the compressed linears of a program."""

    ops: int
    """`linear_cpu` nodes."""
    linears: int
    """Compressed linears in them."""
    left: tuple[str, ...]
    """Why others are left to ATen, a sentence each."""


@dataclass(frozen=True)
class _Linear:
    """A compressed linear: node `base` multiplies by the weight, `total` adds the adapters."""

    base: Node
    total: Node | None
    x: Node
    weight: PackedMatrix
    N: int
    L: PackedMatrix | Tensor | None = None
    R: PackedMatrix | Tensor | None = None
    rank: int = 0


Sized = tuple[PackedMatrix | Tensor, int]
"""A stored matrix [N, K] and its K."""
Read = Callable[[Node], Tensor | None]
Make = Callable[[Node, str, Sequence[Sized]], tuple[Node, Node]]
Renamed = Callable[[str, str], None]


def lower_cpu(
    program: ExportedProgram, *, rounded: bool = False
) -> tuple[ExportedProgram, Lowered]:
    """A program whose compressed linears are `linear_cpu` nodes; the given one is unchanged.

    `rounded`: kernels may multiply by inputs of eight bits, one step a row.
    """
    change = edit(program)
    specs = input_specs(program)

    def read(node: Node) -> Tensor | None:
        return lifted_tensor(program, specs[node.name]) if node.name in specs else None

    def make(like: Node, name: str, matrices: Sequence[Sized]) -> tuple[Node, Node]:
        prefix, _, _ = str(specs[like.name].target).rpartition(PREFIX)
        data, scale = lay_out(matrices)
        fqn = f"{prefix}{PREFIX}cpu_{name}"
        return add_buffer(change, fqn, data), add_buffer(change, f"{fqn}_scale", scale)

    renamed = change.signature.replace_all_uses
    report = lower_graph(change.graph, read, make, renamed=renamed, rounded=rounded)
    _drop_read_buffers(change, specs)
    return change.finish(), report


def lower_graph(
    graph: Graph, read: Read, make: Make, *, renamed: Renamed | None = None, rounded: bool = False
) -> Lowered:
    """Do it in place.

    Args:
        read: the tensor behind a placeholder or attribute, None for what the caller passes.
        make: nodes for data and scales of matrices that follow each other, as `lay_out` makes them,
            named after the given node of a stored weight.
        renamed: told the old and new name of every result.
    """
    found, left = [], []
    for linear in _linears(graph, read):
        K = int(_value(linear.x).shape[-1])
        sized = ((linear.weight, K), (linear.L, K), (linear.R, linear.rank))
        matrices = [(matrix, width) for matrix, width in sized if matrix is not None]
        reason = next((why for why in (why_not(*each) for each in matrices) if why), None)
        if reason is None:
            found.append(_Found(linear, matrices, [Form(*form_of(*each)) for each in matrices]))
        else:
            left.append(f"{linear.base.name}: {reason}")
    joined = _joined(found)
    for group in joined:
        for old, new in _replaced(graph, group, make, rounded):
            old.replace_all_uses_with(new)
            if renamed is not None:
                renamed(old.name, new.name)
    graph.eliminate_dead_code()
    return Lowered(len(joined), len(found), tuple(left))


def lay_out(matrices: Sequence[Sized]) -> tuple[Tensor, Tensor]:
    """Data and scales of matrices one after the other, as `linear_cpu` takes them."""
    parts = [interleave(matrix, K) for matrix, K in matrices]
    data = torch.cat([part.data.flatten() for part in parts])
    return data, torch.cat([part.scale.flatten() for part in parts])


@dataclass(frozen=True)
class _Found:
    """A linear that a kernel takes: its weight, then L and R if it has them."""

    linear: _Linear
    matrices: list[Sized]
    forms: list[Form]


def _joined(found: list[_Found]) -> list[list[_Found]]:
    """Linears that one op takes together, in order of the graph."""
    groups: list[list[_Found]] = []
    last: dict[Any, list[_Found]] = {}
    for each in found:
        alike = (each.linear.x, *each.forms[:2], len(each.forms))
        group = last.get(alike, [])
        if group and group[-1].linear.N % _JOIN == 0 and _can_join([*group, each]):
            group.append(each)
        else:
            last[alike] = [each]
            groups.append(last[alike])
    return groups


def _can_join(group: list[_Found]) -> bool:
    """A bitmask has tiles of its own size; every R must have groups of one size, cut off at r."""
    if any(form.where == "bitmask" for each in group for form in each.forms):
        return False
    seconds = [(each.linear.rank, each.forms[2]) for each in group if len(each.forms) == 3]
    largest = max((R.group for _, R in seconds), default=0)
    alike = len({(R.where, R.bits) for _, R in seconds}) < 2
    return alike and all(R.group == min(largest, whole(rank)) for rank, R in seconds)


def _linears(graph: Graph, read: Read) -> list[_Linear]:
    """Every compressed linear, with the adapters added to it."""
    found: dict[Node, _Linear] = {}
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
                found[node] = _Linear(node, None, node.args[0], weight, _rows(weight))
    order = {node: i for i, node in enumerate(nodes)}
    return sorted(found.values(), key=lambda linear: order[linear.base])


def _with_adapters(total: Any, read: Read) -> _Linear | None:
    """`total` as weight [+ bias] + second(first(x)), if it is that."""
    left, second = total.args[:2]
    base: Any = left.args[0] if isinstance(left, Node) and left.target in _ADDS else left
    first: Any = second.args[0] if isinstance(second, Node) and second.args else None
    if not all(isinstance(node, Node) for node in (base, first)):
        return None
    if base.target not in _STORED or base.args[0] is not first.args[0]:
        return None
    if any(len(node.users) > 1 for node in (base, left, first, second)):
        return None
    weight, L, R = (_matrix(node, read) for node in (base, first, second))
    if weight is None or L is None or R is None or isinstance(weight, Tensor):
        return None
    return _Linear(base, total, base.args[0], weight, _rows(weight), L, R, _rows(L))


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


def _rows(matrix: PackedMatrix | Tensor) -> int:
    if isinstance(matrix, Tensor):
        return matrix.shape[0]
    stored = {PackedDense: "codes", Packed24: "values", PackedBitmask: "mask"}
    return getattr(matrix, stored[type(matrix)]).shape[0]


def _replaced(
    graph: Graph, group: list[_Found], make: Make, rounded: bool
) -> Iterator[tuple[Node, Node]]:
    """Insert the op of a group; what takes the place of what."""
    linears = [each.linear for each in group]
    base: Any = linears[0].base
    names = ("weight", "L", "R")[: len(group[0].forms)]
    args: list[Any] = [base.args[0]]
    for i, name in enumerate(names):
        args += make(base.args[1], name, [each.matrices[i] for each in group])
    args += [None] * (7 - len(args))
    kinds = [
        max((each.forms[i] for each in group), key=lambda f: f.group) for i in range(len(names))
    ]
    args.append([n for form in kinds for n in form.numbers()])
    args.append([linear.N for linear in linears])
    args.append([linear.rank for linear in linears] if len(names) == 3 else [])
    args.append(rounded)
    with graph.inserting_before(base):
        y = _call(graph, base, ops.linear_cpu.default, *args)
        start = 0
        for linear in linears:
            part = y
            if len(linears) > 1:
                part = _call(graph, base, aten.slice.Tensor, y, -1, start, start + linear.N)
            start += linear.N
            yield linear.base, part
            if linear.total is not None:
                yield linear.total, linear.total.args[0]  # type: ignore[misc]


def _call(graph: Graph, like: Node, op: Any, *args: Any) -> Node:
    node = graph.call_function(op, args)
    node.meta = {k: v for k, v in like.meta.items() if k not in ("val", "example_value")}
    key = "val" if "val" in like.meta else "example_value"
    values = [_value(arg) if isinstance(arg, Node) else arg for arg in args]
    with _value(like).fake_mode:
        node.meta[key] = op(*values)
    return node


def _value(node: Node) -> Any:
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def _drop_read_buffers(change: Edit, specs: dict[str, Any]) -> None:
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
