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

import torch
from slimfx.passes.base import add_buffer, edit, input_specs, reader
from slimfx.passes.compressed_linears import (
    CompressedLinear,
    Read,
    Renamed,
    Sized,
    call,
    compressed_linears,
    drop_read_buffers_,
    split_output,
)
from slimfx.passes.find_linears import PREFIX
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.interleave import LANES, form_of, interleave, whole, why_not
from slimfx.runtime.pack import PackedDense
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

aten = torch.ops.aten
ops = torch.ops.slimfx
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


Make = Callable[[Node, str, Sequence[Sized]], tuple[Node, Node]]


def lower_cpu(
    program: ExportedProgram, *, rounded: bool = False
) -> tuple[ExportedProgram, Lowered]:
    """A program whose compressed linears are `linear_cpu` nodes; the given one is unchanged.

    `rounded`: kernels may multiply by inputs of eight bits, one step a row.
    """
    change = edit(program)
    specs = input_specs(program)
    laid_out: dict[Node, tuple[Node, int]] = {}  # codes of eight bits -> their bytes in lanes, K

    def make(like: Node, name: str, matrices: Sequence[Sized]) -> tuple[Node, Node]:
        prefix, _, _ = str(specs[like.name].target).rpartition(PREFIX)
        data, scale = lay_out(matrices)
        fqn = f"{prefix}{PREFIX}cpu_{name}"
        node = add_buffer(change, fqn, data)
        matrix, K = matrices[0]
        if len(matrices) == 1 and isinstance(matrix, PackedDense) and matrix.bits == 8:
            laid_out[like] = node, K
        return node, add_buffer(change, f"{fqn}_scale", scale)

    renamed = change.signature.replace_all_uses
    report = lower_graph(change.graph, reader(program), make, renamed=renamed, rounded=rounded)
    for codes, (data, K) in laid_out.items():
        for user in [user for user in codes.users if user.target is aten.index.Tensor]:
            _look_up_in_lanes(user, data, K)
    drop_read_buffers_(change, specs)
    return change.finish(), report


def _look_up_in_lanes(rows: Node, data: Node, K: int) -> None:
    """Take codes[ids] from the bytes that the kernel of a tied head reads, so that a package holds
    them once: byte k % 4 of a lane's word k // 4, sixteen lanes side by side (`interleave`).
    """
    graph = rows.graph
    indices: Any = rows.args[1]
    ids = indices[0]
    with graph.inserting_before(rows):

        def made(op: Any, *args: Any) -> Node:
            return call(graph, rows, op, *args)

        tile = made(aten.mul.Tensor, made(aten.floor_divide.default, ids, LANES), LANES * whole(K))
        lane = made(aten.mul.Tensor, made(aten.remainder.Scalar, ids, LANES), 4)
        start = made(aten.unsqueeze.default, made(aten.add.Tensor, tile, lane), -1)
        k = made(aten.arange.default, K)
        word = made(aten.mul.Tensor, made(aten.floor_divide.default, k, 4), 4 * LANES)
        within = made(aten.add.Tensor, word, made(aten.remainder.Scalar, k, 4))
        places = made(aten.add.Tensor, start, within)
        signed = made(aten.index.Tensor, data, [places])
        new = made(aten.bitwise_xor.Scalar, signed, 128)
    rows.replace_all_uses_with(new)
    graph.erase_node(rows)


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
    for linear in compressed_linears(graph, read):
        matrices = linear.matrices()
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

    linear: CompressedLinear
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
        y = call(graph, base, ops.linear_cpu.default, *args)
        yield from split_output(graph, linears, y)
