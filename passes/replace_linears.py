"""Replace linears by their compressed form, in a copy of the program.

    y = aten.linear(x, W, b)

becomes

    x' = x [* input_scale], [slimfx.quantize_fp8]
    y  = slimfx.linear_24(x', values, indices, scale) [+ b] [+ second(first(x', L), R)]

with linear_int or linear_bitmask for other layouts, and `first` and `second` one of these or
aten.linear. Layers that read the same x share its FP8 node. The float weights leave the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import slimfx.runtime.ops  # noqa: F401  the ops must exist before their overloads are named
import torch
from slimfx.passes.base import Edit, add_buffer, edit, fake_mode, input_specs
from slimfx.passes.find_linears import PREFIX, Site, Use, storage_key
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedLinear, PackedMatrix
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten


def replace_linears(
    program: ExportedProgram, sites: list[Site], packed: Mapping[str, PackedLinear]
) -> ExportedProgram:
    """A program in which every site named in `packed` is compressed; the given one is unchanged."""
    change = edit(program)
    copies = {node.name: node for node in change.graph.nodes}
    order = {name: place for place, name in enumerate(copies)}
    chosen = [site for site in sites if site.name in packed]
    placeholders = {site.name: _Placeholders(change, site.fqn) for site in chosen}
    uses = [(order[use.node.name], use, site) for site in chosen for use in site.uses]
    rounded: dict[Node, Node] = {}
    for _, use, site in sorted(uses, key=lambda found: found[0]):
        copied = _copied(use, copies[use.node.name])
        _replace(change, copied, packed[site.name], placeholders[site.name], rounded)
    for site in chosen:
        _replace_bias(change, site, packed[site.name].bias)
    _drop_weights(change, [site.fqn for site in chosen])
    return change.finish()


def _replace_bias(change: Edit, site: Site, bias: Tensor | None) -> None:
    if bias is None:
        return
    if site.bias is None:
        raise AssertionError(f"{site.name}: a bias was packed for a layer without one of its own")
    own = change.state_dict[site.bias]
    parameter = isinstance(own, torch.nn.Parameter)
    change.state_dict[site.bias] = torch.nn.Parameter(bias, False) if parameter else bias


class _Placeholders:
    """Lifted buffers of one site, made on first use and shared by all its uses."""

    def __init__(self, change: Edit, fqn: str) -> None:
        self.change = change
        self.prefix = f"{fqn.removesuffix('.weight')}.{PREFIX}"
        self.made: dict[str, Node] = {}

    def get(self, name: str, tensor: Tensor) -> Node:
        if name not in self.made:
            self.made[name] = add_buffer(self.change, self.prefix + name, tensor)
        return self.made[name]


def _copied(use: Use, node: Node) -> Use:
    """The same use in the copy, where an earlier replacement may already have made its input."""
    arguments = list(use.node.args)
    x = node.args[arguments.index(use.x)]
    bias = None if use.bias is None else node.args[arguments.index(use.bias)]
    return Use(node, x, bias)  # type: ignore[arg-type]


def _replace(
    change: Edit,
    use: Use,
    packed: PackedLinear,
    placeholders: _Placeholders,
    rounded: dict[Node, Node],
) -> None:
    """`rounded`: the FP8 node of each x that has one already; uses come in order of the graph."""
    with change.graph.inserting_before(use.node):
        x = use.x
        if packed.input_scale is not None:
            scale = placeholders.get("input_scale", packed.input_scale)
            x = _call(use, aten.mul.Tensor, x, _in_dtype_of(use, scale))
        if packed.fp8:
            rounded[x] = rounded.get(x) or _call(use, torch.ops.slimfx.quantize_fp8.default, x)
            x = rounded[x]
        y = _multiply(use, x, "", packed.weight, placeholders)
        if use.bias is not None:
            y = _call(use, aten.add.Tensor, y, use.bias)
        if packed.L is not None and packed.R is not None:
            hidden = _multiply(use, x, "L", packed.L, placeholders)
            y = _call(use, aten.add.Tensor, y, _multiply(use, hidden, "R", packed.R, placeholders))
    use.node.replace_all_uses_with(y)
    change.signature.replace_all_uses(use.node.name, y.name)
    change.graph.erase_node(use.node)


def _multiply(
    use: Use, x: Node, name: str, matrix: PackedMatrix | Tensor, placeholders: _Placeholders
) -> Node:
    """x times the transpose of a stored matrix."""
    if isinstance(matrix, Tensor):
        weight = placeholders.get(name, matrix)
        return _call(use, aten.linear.default, x, _in_dtype_of(use, weight))
    op, parts = _OPS[type(matrix)]
    prefix = f"{name}_" if name else ""
    tensors = {part: getattr(matrix, part) for part in parts}
    nodes = [
        None if tensor is None else placeholders.get(prefix + part, tensor)
        for part, tensor in tensors.items()
    ]
    return _call(use, op, x, *nodes, matrix.bits, matrix.group)


_OPS: dict[type, tuple[Any, tuple[str, ...]]] = {
    PackedDense: (torch.ops.slimfx.linear_int.default, ("codes", "scale")),
    Packed24: (torch.ops.slimfx.linear_24.default, ("values", "indices", "scale")),
    PackedBitmask: (torch.ops.slimfx.linear_bitmask.default, ("values", "mask", "scale")),
}


def packed_linear(program: ExportedProgram, fqn: str) -> PackedLinear:
    """What `replace_linears` was given for the layer of a weight, but for its bias."""
    prefix = f"{fqn.removesuffix('.weight')}.{PREFIX}"
    own = {
        name: str(spec.target).removeprefix(prefix)
        for name, spec in input_specs(program).items()
        if str(spec.target).startswith(prefix)
    }
    matrices: dict[str, PackedMatrix | Tensor] = {
        name: program.state_dict[prefix + name] for name in own.values() if name in ("L", "R")
    }
    kinds = {op: (kind, parts) for kind, (op, parts) in _OPS.items()}
    fp8 = False
    for node in program.graph.nodes:
        if node.target not in kinds or node.args[1].name not in own:
            continue
        kind, parts = kinds[node.target]
        first = own[node.args[1].name].removesuffix(parts[0])
        tensors = [program.state_dict.get(f"{prefix}{first}{part}") for part in parts]
        matrices[first.removesuffix("_")] = kind(*tensors, *node.args[-2:])
        fp8 = fp8 or node.args[0].target is torch.ops.slimfx.quantize_fp8.default
    return PackedLinear(
        weight=matrices[""],  # type: ignore[arg-type]
        L=matrices.get("L"),
        R=matrices.get("R"),
        input_scale=program.state_dict.get(f"{prefix}input_scale"),
        fp8=fp8,
    )


def _in_dtype_of(use: Use, stored: Node) -> Node:
    """A stored tensor in the dtype of the layer's input: itself, or a cast."""
    dtype = use.x.meta["val"].dtype
    same = stored.meta["val"].dtype is dtype
    return stored if same else _call(use, aten.to.dtype, stored, dtype)


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
