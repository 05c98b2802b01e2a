"""Make the adapters of a compressed program trainable, and put what was trained back.

    y = linear_24(x, ...) [+ b] + linear_int(linear_int(x, L codes), R codes)

becomes, with float32 parameters L and R and all other tensors frozen,

    y = linear_24(x, ...) [+ b] + linear(linear(x, round(L)), round(R))

`round` is slimfx.fake_quantize in the matrix's own bits and groups, its mask applied before it: a
step forward answers as the stored program would, and gradients pass as if nothing was rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import slimfx.runtime.straight_through  # noqa: F401  makes slimfx.fake_quantize
import torch
from slimfx.passes.base import Edit, add_buffer, edit, input_specs, reader
from slimfx.passes.compressed_linears import (
    CompressedLinear,
    call,
    compressed_linears,
    drop_read_buffers_,
    value_of,
)
from slimfx.passes.find_linears import PREFIX
from slimfx.runtime.pack import PackedMatrix
from slimfx.runtime.straight_through import kept, restore, rounding, trainable, why_not
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx import Node

from slimfx.errors import SlimError

aten = torch.ops.aten


@dataclass(frozen=True)
class Trained:
    """A matrix of an adapter: as it is stored, under which names, and the parameter it became."""

    parameter: str
    stored: PackedMatrix | Tensor
    parts: tuple[str, ...]
    """Names of its tensors in the compressed program, in the order of the matrix's own fields."""


def train_adapters(program: ExportedProgram) -> tuple[ExportedProgram, tuple[Trained, ...]]:
    """A program with float32 parameters for L and R, and what these are; the given one stays.

    Raises:
        SlimError: no linear has an adapter, or the scales of one are of no form that is trained.
    """
    change, specs = edit(program), input_specs(program)

    made = _Made(change, specs, {}, {})
    for linear in compressed_linears(change.graph, reader(program)):
        if linear.total is not None:
            _train(made, linear)
    if not made.found:
        raise SlimError(
            "the program has no adapters to train; compress it with a recipe that has some (slim, "
            "slim-q, joint, joint-q), and save it in the form op"
        )
    change.graph.eliminate_dead_code()
    drop_read_buffers_(change, specs)
    for name, tensor in change.state_dict.items():
        if isinstance(tensor, torch.nn.Parameter) and name not in made.found:
            change.state_dict[name] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
    return change.finish(), tuple(made.found.values())


def put_back(
    program: ExportedProgram, trained: tuple[Trained, ...], values: Mapping[str, Tensor]
) -> ExportedProgram:
    """The compressed program with trained adapters, every other tensor shared with the given one.

    `values`: parameter -> float [N, K].
    """
    change = edit(program)
    for each in trained:
        new = _tensors(restore(each.stored, values[each.parameter]))
        for fqn, tensor in zip(each.parts, new, strict=True):
            change.state_dict[fqn] = tensor
    return change.finish()


@dataclass(frozen=True)
class _Made:
    """What was made so far: a matrix that several linears read becomes one parameter."""

    change: Edit
    specs: Mapping[str, InputSpec]
    found: dict[str, Trained]
    nodes: dict[str, tuple[Node, Node | None]]
    """Parameter -> its placeholder, and that of its mask."""


def _train(made: _Made, linear: CompressedLinear) -> None:
    assert linear.total is not None and linear.L is not None and linear.R is not None
    second: Any = linear.total.args[1]
    first: Any = second.args[0]
    K = int(value_of(linear.x).shape[-1])
    for node, matrix, width in ((first, linear.L, K), (second, linear.R, linear.rank)):
        parameter = _parameter(made, node, matrix, width)
        _replace(made.change, node, *made.nodes[parameter], rounding(matrix, width))


def _parameter(made: _Made, node: Node, matrix: PackedMatrix | Tensor, width: int) -> str:
    """The name of the matrix's parameter, which is made at its first use."""
    parts = tuple(_stored_names(made.specs, node))
    prefix, _, name = parts[0].rpartition(PREFIX)
    parameter = f"{prefix}{PREFIX}{name[0]}_trained"
    if parameter not in made.found:
        reason = why_not(matrix, width)
        if reason is not None:
            raise SlimError(f"{prefix}{PREFIX}{name[0]}: {reason}; it cannot be trained")
        mask = kept(matrix, width)
        value = torch.nn.Parameter(trainable(matrix, width))
        placeholder = add_buffer(made.change, parameter, value)
        spec = made.change.signature.input_specs[-1]
        made.change.signature.input_specs[-1] = InputSpec(
            InputKind.PARAMETER, spec.arg, parameter, persistent=None
        )
        masked = None if mask is None else add_buffer(made.change, f"{parameter}_mask", mask)
        made.found[parameter] = Trained(parameter, matrix, parts)
        made.nodes[parameter] = placeholder, masked
    return parameter


def _stored_names(specs: Mapping[str, InputSpec], node: Node) -> list[str]:
    """The program's names of the tensors that a node multiplies by."""
    found = []
    for each in node.args[1:]:
        source = each
        if isinstance(source, Node) and source.name not in specs:  # a cast
            source = source.args[0]
        if isinstance(source, Node):
            found.append(str(specs[source.name].target))
    return found


def _replace(
    change: Edit, node: Node, weight: Node, mask: Node | None, how: tuple[int, int] | None
) -> None:
    """The product as one with a float matrix, rounded on the way."""
    graph = change.graph
    with graph.inserting_before(node):
        if mask is not None:
            weight = call(graph, node, aten.mul.Tensor, weight, mask)
        if how is not None:
            weight = call(graph, node, torch.ops.slimfx.fake_quantize.default, weight, *how)
        dtype = value_of(node.args[0]).dtype  # type: ignore[arg-type]
        if dtype is not torch.float32:
            weight = call(graph, node, aten.to.dtype, weight, dtype)
        y = call(graph, node, aten.linear.default, node.args[0], weight)
    node.replace_all_uses_with(y)
    change.signature.replace_all_uses(node.name, y.name)
    graph.erase_node(node)


def _tensors(matrix: PackedMatrix | Tensor) -> list[Tensor]:
    """The tensors of a stored matrix, in the order of its fields."""
    if isinstance(matrix, Tensor):
        return [matrix]
    every = [getattr(matrix, field.name) for field in fields(matrix)]
    return [value for value in every if isinstance(value, Tensor)]
