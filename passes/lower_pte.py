"""Turn each compressed linear into plain nodes that ExecuTorch lowers: for XNNPACK, or anywhere.

    y = linear_24(x, values, indices, scale) [+ b]

becomes, with form "xnnpack", what its partitioner takes as int8 inputs and int4 weights,

    x' = dequantize(quantize(x, *choose_qparams(x)))                one scale for each row of x
    y  = aten.linear(x', dequantize(codes [N, K], scale [N, K / group])[, b])

and with form "portable", as exact as the program,

    y  = aten.linear(x, unpacked codes) * scale [+ b]

Codes of 2 and 3 bits become 4 bits; zeros of sparse weights are stored, since no kernel of either
form skips them. Scales keep their values: XNNPACK stores bfloat16, as the program does.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import slimfx.runtime.ops  # noqa: F401  the ops must exist before their overloads are named
import torch
import torch.ao.quantization.fx._decomposed  # the ops that XNNPACK's partitioner knows
from slimfx.passes.base import Edit, add_buffer, edit, fake_mode, input_specs, lifted_tensor
from slimfx.passes.find_linears import PREFIX
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedMatrix, stored_values
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec
from torch.fx import Node, map_arg
from torch.nn.functional import pad

from slimfx.errors import ArtifactError

FORMS = ("xnnpack", "portable")
aten = torch.ops.aten
ops = torch.ops.slimfx
_STORED: dict[Any, tuple[Any, int]] = {
    ops.linear_int.default: (PackedDense, 2),
    ops.linear_24.default: (Packed24, 3),
    ops.linear_bitmask.default: (PackedBitmask, 3),
}
"""Op -> the matrix it multiplies by, and how many tensors that has."""
_BLOCK = 32
"""XNNPACK's groups of int4 weights have a multiple of so many inputs."""


@dataclass(frozen=True)
class Lowered:
    """What became of the compressed matrices of a program; adapters count by themselves."""

    integer: int
    """Products of int8 inputs and integer weights, for XNNPACK."""
    floating: int
    """Products at full precision."""
    notes: tuple[str, ...]
    """What takes more room or time than it might, and why, a sentence each."""


@dataclass(frozen=True)
class _Product:
    """`node` = x times a stored matrix [N, K], written out: `values` int8 codes, or floats where
    there is no scale; `scale` float32 [N, groups].
    """

    node: Node
    stem: str
    """What the names of the matrix's tensors begin with."""
    values: Tensor
    scale: Tensor | None
    bits: int
    integer: bool
    """Lowered to integers for XNNPACK."""
    reason: str = ""
    """Why not, where the codes are unpacked for it."""

    def widened(self, rows: int) -> _Product:
        """The same with so many more rows of zeros."""
        scale = None if self.scale is None else pad(self.scale, (0, 0, 0, rows), value=1.0)
        return replace(self, values=pad(self.values, (0, 0, 0, rows)), scale=scale)


@dataclass(frozen=True)
class _Lowering:
    """The edit under way, and what several products share."""

    change: Edit
    specs: Mapping[str, InputSpec]
    buffers: dict[str, Node] = field(default_factory=dict)

    def buffer(self, name: str, tensor: Tensor) -> Node:
        """The constant of that name, made on first use."""
        if name not in self.buffers:
            self.buffers[name] = add_buffer(self.change, name, _row_by_row(tensor))
        return self.buffers[name]

    def call(self, like: Node, op: Any, *args: Any) -> Node:
        """A node with the metadata of another one, but for the value it really has."""
        node = self.change.graph.call_function(op, args)
        values = map_arg(args, lambda arg: arg.meta["val"])
        with fake_mode(self.change.graph):
            node.meta = {**like.meta, "val": op(*values)}
        return node


def lower_pte(
    program: ExportedProgram, *, form: str = "xnnpack"
) -> tuple[ExportedProgram, Lowered]:
    """A program without slimfx's linears, in one of `FORMS`; the given one is unchanged.

    Raises:
        ArtifactError: unknown form, or a compressed linear whose inputs are not float32, or are
            rounded to 8-bit floats.
    """
    if form not in FORMS:
        raise ArtifactError(f"form {form!r} is not one of {', '.join(FORMS)}")
    lowering = _Lowering(edit(program), input_specs(program))
    graph = lowering.change.graph
    if any(node.target is ops.quantize_fp8.default for node in graph.nodes):
        raise ArtifactError(
            "the program rounds inputs to 8-bit floats, which ExecuTorch does not have; compress "
            "the model with inputs: null"
        )
    _lay_out(lowering)
    notes = []
    if form == "xnnpack":
        notes += _cast_ahead(lowering, program)
    found = [_product(program, node, form) for node in graph.nodes if node.target in _STORED]
    for product in _widened(found):
        _replace(lowering, product)
    graph.eliminate_dead_code()
    _drop_read_buffers(lowering)
    integer = sum(product.integer for product in found)
    notes += _notes(found, form)
    return lowering.change.finish(), Lowered(integer, len(found) - integer, tuple(notes))


def _lay_out(lowering: _Lowering) -> None:
    """Store parameters row after row: ExecuTorch's kernels refuse other orders."""
    held = lowering.change.state_dict
    for node in lowering.change.graph.nodes:
        target = str(lowering.specs[node.name].target) if node.name in lowering.specs else ""
        tensor = held.get(target)
        if tensor is None or tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
            continue
        made = _row_by_row(tensor)
        parameter = isinstance(tensor, torch.nn.Parameter)
        held[target] = torch.nn.Parameter(made, False) if parameter else made
        mode = fake_mode(lowering.change.graph)
        node.meta["val"] = mode.from_tensor(made, static_shapes=True)


def _row_by_row(tensor: Tensor) -> Tensor:
    """The same numbers with the strides of their shape, those of dimensions of one included."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _product(program: ExportedProgram, node: Node, form: str) -> _Product:
    specs = input_specs(program)
    kind, count = _STORED[node.target]
    stored: list[Any] = list(node.args[1 : 1 + count])
    tensors = [None if n is None else lifted_tensor(program, specs[n.name]) for n in stored]
    matrix: PackedMatrix = kind(*tensors, *node.args[1 + count :])
    stem = str(specs[stored[0].name].target).rpartition("_")[0]
    x: Any = node.args[0]
    value = x.meta["val"]
    if value.dtype is not torch.float32:
        raise ArtifactError(
            f"{_layer(stem)}: its inputs are {value.dtype}, ExecuTorch's kernels of linears take "
            f"float32; capture the model with dtype='float32'"
        )
    values = stored_values(matrix, int(value.shape[-1]))
    scale = matrix.scale
    if scale is None:
        return _Product(node, stem, values, None, matrix.bits, False)
    reason = "" if form == "portable" else _why_not(matrix)
    integer = form == "xnnpack" and not reason
    values = pad(values, (0, -values.shape[1] % _multiple(matrix, integer)))
    scale = scale.float().expand(len(values), -1)
    if scale.shape[1] > 1:
        scale = pad(scale, (0, values.shape[1] // matrix.group - scale.shape[1]), value=1.0)
    return _Product(node, stem, values, scale, max(4, matrix.bits), integer, reason)


def _grouped(matrix: PackedMatrix) -> bool:
    return matrix.scale is not None and matrix.scale.shape[1] > 1


def _why_not(matrix: PackedMatrix) -> str:
    """Why XNNPACK does not take the codes of a matrix, "" if it does."""
    if matrix.bits == 8 and _grouped(matrix):
        return "int8 codes in groups, XNNPACK takes one scale a row with them"
    if matrix.bits < 8 and _grouped(matrix) and matrix.group % _BLOCK:
        return f"groups of {matrix.group} inputs, not a multiple of {_BLOCK}"
    return ""


def _multiple(matrix: PackedMatrix, integer: bool) -> int:
    """What the width of the codes is brought to a multiple of."""
    if _grouped(matrix):
        return matrix.group if matrix.bits == 8 or matrix.group % 2 == 0 else 2 * matrix.group
    if matrix.bits == 8:
        return 1
    return _BLOCK if integer else 2


def _widened(products: list[_Product]) -> Iterator[_Product]:
    """Where codes are wider than x, which is the product of an adapter's other half, that one gets
    as many more rows.
    """
    wanted: dict[Any, int] = {}
    for product in products:
        x: Any = product.node.args[0]
        if len(x.users) == 1:
            wanted[x] = product.values.shape[1] - int(x.meta["val"].shape[-1])
    for product in products:
        yield product.widened(wanted.get(product.node, 0))


def _replace(lowering: _Lowering, product: _Product) -> None:
    node = product.node
    x: Any = node.args[0]
    last, bias = _bias(lowering, node)
    with lowering.change.graph.inserting_before(node):
        x = _padded(lowering, node, x, product.values.shape[1])
        lower = _integers if product.integer else _floats if product.scale is None else _unpacked
        y = lower(lowering, product, x, bias)
    last.replace_all_uses_with(y)
    lowering.change.signature.replace_all_uses(last.name, y.name)


def _padded(lowering: _Lowering, like: Node, x: Node, width: int) -> Node:
    """x [..., K] with zeros after it; torch's own pad wants its other sizes to be fixed."""
    K = int(x.meta["val"].shape[-1])
    whole, rest = divmod(width - K, K)
    if not whole and not rest:
        return x
    zeros = lowering.call(like, aten.zeros_like.default, x)
    parts = [x, *[zeros] * whole]
    if rest:
        parts.append(lowering.call(like, aten.slice.Tensor, zeros, -1, 0, rest))
    return lowering.call(like, aten.cat.default, parts, -1)


def _bias(lowering: _Lowering, node: Node) -> tuple[Node, list[Node]]:
    """The node that adds a bias to a product, and the bias, where there is one."""
    user = next(iter(node.users), node)
    if len(node.users) == 1 and user.target is aten.add.Tensor and len(user.args) == 2:
        left, right = user.args
        if left is node and isinstance(right, Node) and right.name in lowering.specs:
            shapes = [each.meta["val"].shape for each in (right, node)]
            return (user, [right]) if shapes[0] == shapes[1][-1:] else (node, [])
    return node, []


def _integers(lowering: _Lowering, product: _Product, x: Node, bias: list[Node]) -> Node:
    """As XNNPACK's partitioner knows it: codes of 4 bits are declared from -8 to 7."""
    scale, stem, quantized = product.scale, product.stem, torch.ops.quantized_decomposed
    assert scale is not None
    single = product.bits == 8
    codes = lowering.buffer(f"{stem}_pte_codes", product.values)
    zero = torch.zeros(scale.shape, dtype=torch.int32)
    scales, zeros = (
        lowering.buffer(f"{stem}_pte_{name}", tensor.flatten() if single else tensor)
        for name, tensor in (("scale", scale), ("zero", zero))
    )
    op, args = quantized.dequantize_per_channel.default, [0, -128, 127, torch.int8]
    if not single:
        op = quantized.dequantize_per_channel_group.default
        args = [-8, 7, torch.int8, product.values.shape[1] // scale.shape[1], torch.float32]
    weight = lowering.call(product.node, op, codes, scales, zeros, *args)
    x = _rounded(lowering, product.node, x)
    return lowering.call(product.node, aten.linear.default, x, weight, *bias)


def _rounded(lowering: _Lowering, like: Node, x: Node) -> Node:
    """x through int8, each row with its own scale and zero.

    Products never share these nodes: the partitioner would join what they are part of, and fail
    where other nodes lie between.
    """
    quantized, limits = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
    both = lowering.call(like, quantized.choose_qparams_per_token_asymmetric.default, x, torch.int8)
    chosen = [lowering.call(like, operator.getitem, both, i) for i in (0, 1)]
    codes = lowering.call(like, quantized.quantize_per_token.default, x, *chosen, *limits)
    op = quantized.dequantize_per_token.default
    return lowering.call(like, op, codes, *chosen, *limits, torch.float32)


def _floats(lowering: _Lowering, product: _Product, x: Node, bias: list[Node]) -> Node:
    weight = lowering.buffer(f"{product.stem}_pte_values", product.values.float())
    return lowering.call(product.node, aten.linear.default, x, weight, *bias)


def _unpacked(lowering: _Lowering, product: _Product, x: Node, bias: list[Node]) -> Node:
    """Codes unpacked by ATen on each call, two from a byte where they have 4 bits."""
    assert product.scale is not None
    like, (N, K), groups = product.node, product.values.shape, product.scale.shape[1]
    if product.bits == 4:
        weight = _nibbles(lowering, product)
    else:
        codes = lowering.buffer(f"{product.stem}_pte_codes", product.values)
        weight = lowering.call(like, aten.to.dtype, codes, torch.float32)
    scale = product.scale[..., None] if groups > 1 else product.scale.flatten()
    scales = lowering.buffer(f"{product.stem}_pte_scale", scale)
    if groups > 1:
        blocks = lowering.call(like, aten.view.default, weight, [N, groups, K // groups])
        scaled = lowering.call(like, aten.mul.Tensor, blocks, scales)
        weight = lowering.call(like, aten.view.default, scaled, [N, K])
        return lowering.call(like, aten.linear.default, x, weight, *bias)
    y = lowering.call(like, aten.linear.default, x, weight)
    y = lowering.call(like, aten.mul.Tensor, y, scales)
    return lowering.call(like, aten.add.Tensor, y, *bias) if bias else y


def _nibbles(lowering: _Lowering, product: _Product) -> Node:
    """Codes of 4 bits as floats, from bytes that hold the first of two in their low half."""
    like, codes = product.node, (product.values + 8).to(torch.uint8)
    both = codes[:, ::2] | (codes[:, 1::2] << 4)
    packed = lowering.buffer(f"{product.stem}_pte_nibbles", both)
    low = lowering.call(like, aten.bitwise_and.Scalar, packed, 15)
    high = lowering.call(like, aten.bitwise_right_shift.Tensor_Scalar, packed, 4)
    pairs = lowering.call(like, aten.stack.default, [low, high], -1)
    flat = lowering.call(like, aten.view.default, pairs, list(codes.shape))
    floats = lowering.call(like, aten.to.dtype, flat, torch.float32)
    return lowering.call(like, aten.sub.Tensor, floats, 8.0)


def _cast_ahead(lowering: _Lowering, program: ExportedProgram) -> list[str]:
    """Store as float32 what the program casts to it on each call, which XNNPACK does not."""
    grown = 0
    for node in lowering.change.graph.nodes:
        stored: Any = node.args[0] if node.target is aten.to.dtype else None
        spec = lowering.specs.get(stored.name) if isinstance(stored, Node) else None
        if spec is None or PREFIX not in str(spec.target) or node.args[1] is not torch.float32:
            continue
        tensor = lifted_tensor(program, spec)
        made = lowering.buffer(f"{spec.target}_pte_float", tensor.float())
        node.replace_all_uses_with(made)
        grown += tensor.numel() * (4 - tensor.element_size())
    if not grown:
        return []
    return [
        f"adapters and scales of bfloat16 are stored as float32, {grown:,} bytes more: XNNPACK has "
        f"no bfloat16; compress with adapter bits 4 for smaller ones"
    ]


def _notes(products: list[_Product], form: str) -> list[str]:
    notes = [
        f"{_layer(product.stem)}: {product.reason}; its codes are unpacked on each call, and the "
        f"product is not XNNPACK's"
        for product in products
        if product.reason
    ]
    floats = [product.values.numel() for product in products if product.scale is None]
    if floats:
        notes.append(
            f"{len(floats)} matrices of bfloat16 are stored densely as float32, "
            f"{4 * sum(floats):,} bytes; quantize them to make the file smaller"
        )
    return notes


def _layer(stem: str) -> str:
    """The layer a stored matrix belongs to, and which of its adapters it is."""
    layer, _, part = stem.rpartition(f".{PREFIX.removesuffix('_')}")
    return f"{layer} {part.removeprefix('_')}".rstrip()


def _drop_read_buffers(lowering: _Lowering) -> None:
    """Forget the stored matrices that no node reads any more."""
    change = lowering.change
    unread = {
        node.name: node
        for node in change.graph.nodes
        if node.name in lowering.specs
        and not node.users
        and f".{PREFIX}" in str(lowering.specs[node.name].target)
    }
    for name, node in unread.items():
        del change.state_dict[str(lowering.specs[name].target)]
        change.graph.erase_node(node)
    change.signature.input_specs[:] = [
        spec
        for spec in change.signature.input_specs
        if spec.arg.name not in unread  # type: ignore[union-attr]
    ]
