"""Turn each compressed product into one that ONNX can say.

    linear_int | linear_24 | linear_bitmask (x, ...)     of codes

becomes matmul_nbits(x, B, scales), which ONNX Runtime has as com.microsoft MatMulNBits, and of
bfloat16 values

    aten.linear(x, weight)                               the weight dense, zeros included

Weight and adapters are products of their own. quantize_fp8 is written out in ATen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import slimfx.runtime.ops  # noqa: F401  the ops must exist before their overloads are named
import torch
from slimfx.passes.base import Edit, add_buffer, edit, fake_mode, input_specs, lifted_tensor
from slimfx.passes.decompose import decompose, slimfx_nodes
from slimfx.passes.find_linears import PREFIX
from slimfx.runtime.nbits import ACCURACIES, pack_nbits, why_not
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedMatrix, stored_values
from torch.export import ExportedProgram
from torch.fx import Node

from slimfx.errors import ArtifactError

aten = torch.ops.aten
ops = torch.ops.slimfx
_STORED: dict[Any, tuple[Any, int]] = {
    ops.linear_int.default: (PackedDense, 2),
    ops.linear_24.default: (Packed24, 3),
    ops.linear_bitmask.default: (PackedBitmask, 3),
}
"""Op -> the matrix it multiplies by, and how many tensors that has."""


@dataclass(frozen=True)
class LoweredOnnx:
    """What became of the compressed products of a program, by the layer's name and part."""

    nbits: tuple[str, ...]
    """Stored once as MatMulNBits reads them."""
    sparse: tuple[str, ...]
    """Those among them whose zeros the file spells out."""
    sparse_bytes: int
    """What these take."""
    stored_bytes: int
    """What they took before."""
    dense: tuple[str, ...]
    """Stored as dense bfloat16 values."""


def lower_onnx(
    program: ExportedProgram, *, accuracy_level: int = 1
) -> tuple[ExportedProgram, LoweredOnnx]:
    """A program whose only ops of slimfx are `matmul_nbits`; the given one is unchanged.

    Args:
        accuracy_level: 1 multiplies floats, 4 rounds the inputs to eight bits.

    Raises:
        ArtifactError: unknown level, or a layer whose groups MatMulNBits does not take.
    """
    if accuracy_level not in ACCURACIES:
        levels = ", ".join(map(str, ACCURACIES))
        raise ArtifactError(f"accuracy_level {accuracy_level} is not one of {levels}")
    change = edit(program)
    stored = _Stored(change, program)
    for node in list(change.graph.nodes):
        if node.target in _STORED:
            new = _product(node, stored, accuracy_level)
            node.replace_all_uses_with(new)
            change.signature.replace_all_uses(node.name, new.name)
            change.graph.erase_node(node)
    stored.drop_old()
    nbits = [each for each in stored.made.values() if each.numbers]
    sparse = [each for each in nbits if each.sparse]
    lowered = change.finish()
    if slimfx_nodes(lowered):
        lowered = _with_dimensions(decompose(lowered))
    return lowered, LoweredOnnx(
        nbits=tuple(each.name for each in nbits),
        sparse=tuple(each.name for each in sparse),
        sparse_bytes=sum(each.bytes for each in sparse),
        stored_bytes=sum(each.stored_bytes for each in sparse),
        dense=tuple(each.name for each in stored.made.values() if not each.numbers),
    )


def _with_dimensions(program: ExportedProgram) -> ExportedProgram:
    """Say over which dimensions a largest value is, where that is all of them; ONNX needs it."""
    change = edit(program)
    for node in change.graph.nodes:
        if node.target is aten.amax.default and len(node.args) == 1:
            node.args = (node.args[0], list(range(node.args[0].meta["val"].dim())))
    return change.finish()


@dataclass(frozen=True)
class _Made:
    """The new tensors of a stored matrix, and the numbers that go with them."""

    name: str
    nodes: tuple[Node, ...]
    numbers: tuple[int, ...]
    """K, N, bits and block of a MatMulNBits, none for dense values."""
    sparse: bool
    stored_bytes: int

    @property
    def bytes(self) -> int:
        """What the new tensors take."""
        return sum(node.meta["val"].nbytes for node in self.nodes)


class _Stored:
    """Every stored matrix in its new layout, made on first use and shared by all its uses."""

    def __init__(self, change: Edit, program: ExportedProgram) -> None:
        self.change = change
        self.program = program
        self.specs = input_specs(program)
        self.made: dict[str, _Made] = {}
        self.old: dict[str, Node] = {}

    def get(self, node: Node) -> _Made:
        """The matrix that a node multiplies by."""
        kind, count = _STORED[node.target]
        parts: Any = node.args[1 : 1 + count]
        first = str(self.specs[parts[0].name].target)
        if first not in self.made:
            tensors = [p and lifted_tensor(self.program, self.specs[p.name]) for p in parts]
            matrix = kind(*tensors, *node.args[1 + count :])
            before = sum(tensor.nbytes for tensor in tensors if tensor is not None)
            self.made[first] = self._laid_out(first, matrix, _width(node), before)
            self.old |= {part.name: part for part in parts if part is not None}
        return self.made[first]

    def _laid_out(self, first: str, matrix: PackedMatrix, K: int, before: int) -> _Made:
        layer, _, part = first.partition(f".{PREFIX}")
        part = part.rpartition("_")[0]  # "L_codes" -> "L", "codes" -> ""
        name = f"{layer}.{part}" if part else layer
        prefix = f"{layer}.{PREFIX}{part}{'_' if part else ''}"
        sparse = not isinstance(matrix, PackedDense)
        if matrix.scale is None:
            weight = add_buffer(self.change, f"{prefix}weight", stored_values(matrix, K))
            return _Made(name, (weight,), (), sparse, before)
        reason = why_not(matrix)
        if reason is not None:
            raise ArtifactError(
                f"{name}: {reason}, which MatMulNBits needs; compress it with group 32, 64 or 128, "
                f"or with one scale per channel"
            )
        packed = pack_nbits(matrix, K)
        B = add_buffer(self.change, f"{prefix}B", packed.B)
        scales = add_buffer(self.change, f"{prefix}scales", packed.scales)
        numbers = (K, len(packed.B), packed.bits, packed.block)
        return _Made(name, (B, scales), numbers, sparse, before)

    def drop_old(self) -> None:
        """Forget the canonical layout, but for what lookups read."""
        unread = {name: node for name, node in self.old.items() if not node.users}
        for name, node in unread.items():
            del self.change.state_dict[str(self.specs[name].target)]
            self.change.graph.erase_node(node)
        self.change.signature.input_specs[:] = [
            spec
            for spec in self.change.signature.input_specs
            if spec.arg.name not in unread  # type: ignore[union-attr]
        ]


def _width(node: Node) -> int:
    x: Any = node.args[0]
    return int(x.meta["val"].shape[-1])


def _product(node: Node, stored: _Stored, accuracy_level: int) -> Node:
    """What takes a node's place, before it; other dtypes than float32 are cast to it and back."""
    made = stored.get(node)
    x: Any = node.args[0]
    dtype = x.meta["val"].dtype
    with node.graph.inserting_before(node):
        if not made.numbers:
            (weight,) = made.nodes
            if dtype is not torch.bfloat16:
                weight = _call(node, aten.to.dtype, weight, dtype)
            return _call(node, aten.linear.default, x, weight)
        if dtype is not torch.float32:
            x = _call(node, aten.to.dtype, x, torch.float32)
        y = _call(node, ops.matmul_nbits.default, x, *made.nodes, *made.numbers, accuracy_level)
        return y if dtype is torch.float32 else _call(node, aten.to.dtype, y, dtype)


def _call(like: Node, op: Any, *args: Any) -> Node:
    """A node with another's metadata, but for the value it really has."""
    node = like.graph.call_function(op, args)
    node.meta = dict(like.meta)
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    with fake_mode(like.graph):
        node.meta["val"] = op(*values)
    return node
