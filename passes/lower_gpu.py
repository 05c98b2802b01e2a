"""Turn each compressed linear, its adapters included, into one op that GPU kernels run.

    y = linear_24(x, ...) [+ b] + linear_int(linear_int(x, L), R)
    k = linear_24(x, ...) [+ c] + linear_int(linear_int(x, M), S)

becomes

    both = linear_gpu(x, [W; V], [L; M], [R; S])
    y, k = both[:n] [+ b], both[n:] [+ c]

Linears that read the same x join where their numbers are stored alike and the rows of all but the
last are a multiple of 16. The weights are laid out for the kernels that `select` chooses for the
rows that x may have, here and once: a program of one row of x holds them once, one of any number of
rows twice.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    value_of,
)
from slimfx.passes.find_linears import PREFIX
from slimfx.runtime import gpu_ops
from slimfx.runtime.gpu_layout import form_of, lay_out, stacked, why_not
from slimfx.runtime.pack import PackedBitmask
from slimfx.runtime.select import LAYOUTS, Choice, Form, Gpu, Layer, stretches
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

_PARTS = 4
_ROWS = 16
_NAMES = ("weight", "L", "R")
_LAYOUTS = ("fragments", "stored")
Make = Callable[[Node, str, Sequence[Sized], Callable[[Sequence[Sized]], list[Tensor]]], list[Node]]
"""Nodes for what a function makes of stored matrices, named after the node of a stored weight."""


@dataclass(frozen=True)
class LoweredGpu:
    """What became of the compressed linears of a program."""

    ops: int
    """`linear_gpu` nodes."""
    linears: int
    """Compressed linears in them."""
    left: tuple[str, ...]
    """Why others are left to ATen, a sentence each."""
    kernels: Mapping[str, tuple[Choice, ...]]
    """Name of a node -> the kernels for the rows that its x may have, and why not others."""


def lower_gpu(
    program: ExportedProgram,
    gpu: Gpu,
    *,
    rows: tuple[int, int] | None = None,
    layouts: Sequence[str] = _LAYOUTS,
) -> tuple[ExportedProgram, LoweredGpu]:
    """A program whose compressed linears are `linear_gpu` nodes; the given one is unchanged.

    Args:
        rows: the fewest and most rows that x will have, where that is less than the program allows.
        layouts: those that weights may be laid out in.

    Raises:
        SlimError: Triton is not installed.
    """
    change = edit(program)
    specs = input_specs(program)

    def make(
        like: Node,
        name: str,
        matrices: Sequence[Sized],
        laid_out: Callable[[Sequence[Sized]], list[Tensor]],
    ) -> list[Node]:
        prefix, _, _ = str(specs[like.name].target).rpartition(PREFIX)
        fqn = f"{prefix}{PREFIX}gpu_{name}"
        tensors = laid_out(matrices)
        return [add_buffer(change, f"{fqn}_{i}", tensor) for i, tensor in enumerate(tensors)]

    renamed = change.signature.replace_all_uses
    own: dict[str, Any] = {"renamed": renamed, "rows": rows, "layouts": layouts}
    report = lower_graph(change.graph, reader(program), make, gpu, **own)
    drop_read_buffers_(change, specs)
    return change.finish(), report


def lower_graph(
    graph: Graph,
    read: Read,
    make: Make,
    gpu: Gpu,
    *,
    renamed: Renamed | None = None,
    rows: tuple[int, int] | None = None,
    layouts: Sequence[str] = _LAYOUTS,
) -> LoweredGpu:
    """Do it in place; arguments as in `lower_gpu`, and of the types above."""
    found, left = [], []
    choose = partial(_choices, gpu=gpu, rows=rows, layouts=layouts)
    for linear in compressed_linears(graph, read):
        matrices = linear.matrices()
        reason = next((why for why in (why_not(*each) for each in matrices) if why), None)
        if reason is None:
            choices = choose(linear, [form_of(*each) for each in matrices])
            reason = next((_reasons(each) for each in choices if each.kernel is None), None)
        if reason is None:
            found.append((linear, matrices))
        else:
            left.append(f"{linear.base.name}: {reason}")
    joined = _joined(found)
    kernels = {}
    for group in joined:
        linears = [linear for linear, _ in group]
        y, kernels_of_it = _insert(graph, group, make, choose)
        kernels[y.name] = kernels_of_it
        with graph.inserting_before(linears[0].base):
            for old, new in split_output(graph, linears, y):  # one at a time: they build on it
                old.replace_all_uses_with(new)
                if renamed is not None:
                    renamed(old.name, new.name)
    graph.eliminate_dead_code()
    return LoweredGpu(len(joined), len(found), tuple(left), kernels)


_Found = tuple[CompressedLinear, list[Sized]]
"""A linear with its weight, then L and R if it has them."""


def _choices(
    linear: CompressedLinear,
    forms: Sequence[Form],
    *,
    gpu: Gpu,
    rows: tuple[int, int] | None,
    layouts: Sequence[str],
) -> tuple[Choice, ...]:
    """The kernels for the rows that x may have."""
    x = value_of(linear.x)
    layer = Layer(forms[0], tuple(forms[1:]), x.dtype)
    return stretches(layer, *(rows or _rows_of(x)), gpu, layouts=layouts)


def _rows_of(x: Tensor) -> tuple[int, int]:
    """The fewest and most rows that x may have."""
    M = math.prod(x.shape[:-1])
    if not isinstance(M, torch.SymInt):
        return M, M
    limits = M.node.shape_env.bound_sympy(M.node.expr)
    low, high = (
        int(limit) if limit.is_Integer else sys.maxsize for limit in (limits.lower, limits.upper)
    )
    return low, high


def _reasons(choice: Choice) -> str:
    first, last = choice.rows
    span = f"{first} or more" if last == sys.maxsize else f"{first} to {last}"
    reasons = "; ".join(f"{name}: {why}" for name, why in choice.why_not.items())
    return f"no kernel for {span} rows of x: {reasons}"


def _joined(found: Sequence[_Found]) -> list[list[_Found]]:
    """Linears that one op takes together, in order of the graph."""
    groups: list[list[_Found]] = []
    last: dict[Any, list[_Found]] = {}
    for linear, matrices in found:
        alike = (linear.x, *(_kind(i, *each) for i, each in enumerate(matrices)))
        group = last.get(alike, [])
        in_rows = not any(isinstance(matrix, PackedBitmask) for matrix, _ in matrices)
        if group and in_rows and len(group) < _PARTS and group[-1][0].N % _ROWS == 0:
            group.append((linear, matrices))
        else:
            last[alike] = [(linear, matrices)]
            groups.append(last[alike])
    return groups


def _kind(i: int, matrix: Any, K: int) -> tuple[Any, ...]:
    """What matrices that follow each other have in common; each R may have a K of its own."""
    if isinstance(matrix, Tensor):
        return "floats", matrix.dtype
    form = form_of(matrix, K)
    return form.where, form.bits, matrix.group if _NAMES[i] == "R" else form.group


def _insert(
    graph: Graph,
    group: Sequence[_Found],
    make: Make,
    choose: Callable[[CompressedLinear, Sequence[Form]], tuple[Choice, ...]],
) -> tuple[Node, tuple[Choice, ...]]:
    """The op of a group, and the kernels that it may run."""
    linears = [linear for linear, _ in group]
    base: Any = linears[0].base
    rank = linears[0].rank
    if len(group) > 1 and rank:
        rank = -(-max(linear.rank for linear in linears) // _ROWS) * _ROWS
    sides = [[matrices[i] for _, matrices in group] for i in range(len(group[0][1]))]
    forms = [form_of(*_stacked(i, side, rank)) for i, side in enumerate(sides)]
    choices = choose(linears[0], forms)
    args: list[Any] = [base.args[0]]
    for layout in _LAYOUTS:
        nodes: list[Node] = []
        if any(LAYOUTS[each.kernel] == layout for each in choices if each.kernel):
            for i, side in enumerate(sides):
                how = partial(_laid_out, i, rank, layout)
                nodes += make(base.args[1], f"{layout}_{_NAMES[i]}", side, how)
        args.append(nodes)
    args.append([number for form in forms for number in form.numbers()])
    args += [[linear.N for linear in linears], rank]
    with graph.inserting_before(base):
        return call(graph, base, gpu_ops.OP, *args), choices


def _stacked(i: int, side: Sequence[Sized], rank: int) -> Sized:
    """Weights, Ls or Rs that follow each other."""
    if len(side) == 1:
        return side[0]
    sizes = {"weight": {}, "L": {"rows": rank}, "R": {"columns": rank}}
    return stacked(side, **sizes[_NAMES[i]])


def _laid_out(i: int, rank: int, layout: str, side: Sequence[Sized]) -> list[Tensor]:
    """Their tensors in a layout."""
    return lay_out(*_stacked(i, side, rank), layout)
