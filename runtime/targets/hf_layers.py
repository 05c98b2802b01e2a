"""The compressed linears of a program as a Hugging Face folder stores them.

    y = W (x * s) + b + R (L (x * s))

becomes, where X is the layer's module in the model,

    X.weight_packed int32 [N, ceil(K bits / 32)]   codes + 2^(bits-1), lowest bits first
    X.weight_scale        [N, K / group] or [N, 1]  W = codes * scale; s is in it
    X.weight_shape  int64 [2]                       N, K
    lora_A = L * s, lora_B = R                      of a PEFT adapter with alpha = r

as compressed-tensors' pack-quantized format has it. Weights of floats become a plain X.weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import slimfx.runtime.ops  # noqa: F401  the ops must exist before their overloads are named
import torch
from slimfx.passes.base import input_specs
from slimfx.passes.find_linears import PREFIX, module_path
from slimfx.passes.replace_linears import packed_linear
from slimfx.runtime import int_weights
from slimfx.runtime.pack import (
    Layout,
    Packed24,
    PackedDense,
    PackedLinear,
    PackedMatrix,
    pack_codes,
    row_count,
    stored_values,
)
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from slimfx.errors import ArtifactError

ROOT = "model."
"""What capture puts before the names of a Hugging Face model's own parameters."""

_OPS = (
    torch.ops.slimfx.linear_int.default,
    torch.ops.slimfx.linear_24.default,
    torch.ops.slimfx.linear_bitmask.default,
)
_MODULE = "torch.nn.modules.linear.Linear"
"""The only module with a weight [N, K] that compressed-tensors decompresses."""
_GROUP = 128
"""Inputs of a group where the weight has one scale a row, or a whole tensor."""


@dataclass(frozen=True)
class Scheme:
    """How the codes of a weight are stored; `group` None stands for one scale a row."""

    bits: int
    group: int | None


@dataclass(frozen=True)
class Layer:
    """One compressed linear."""

    name: str
    """The module in the model, without what capture put before it."""
    shape: tuple[int, int]
    layout: str
    """As the program stores it, such as "2:4 int4"."""
    scheme: Scheme | None
    """None for a weight of floats, which the folder stores densely."""
    tensors: Mapping[str, Tensor]
    """The weight, by the names of the folder."""
    A: Tensor | None
    B: Tensor | None
    coded: bool
    """The adapter has codes in the program, and is stored in floats that hold these exactly."""
    notes: tuple[str, ...]
    """What is larger or rounder than in the program."""

    @property
    def rank(self) -> int:
        """Rank of the adapter, 0 without one."""
        return 0 if self.A is None else self.A.shape[0]


def read_layers(program: ExportedProgram) -> tuple[Layer, ...]:
    """Every compressed linear, in order of first use.

    Raises:
        ArtifactError: a layer that neither compressed-tensors nor PEFT can express.
    """
    specs = input_specs(program)
    uses: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.target in _OPS:
            prefix, _, part = str(specs[node.args[1].name].target).rpartition(f".{PREFIX}")
            if part in ("codes", "values"):  # not of an adapter
                uses.setdefault(prefix, []).append(node)
    return tuple(_layer(program, prefix, nodes) for prefix, nodes in uses.items())


def own_name(name: str) -> str:
    """A parameter's or module's name in the model that was captured.

    Raises:
        ArtifactError: the program was not captured from a Hugging Face model.
    """
    if not name.startswith(ROOT):
        raise ArtifactError(
            f"{name}: does not begin with {ROOT!r}, as in programs that slimfx.capture makes of a "
            f"Hugging Face folder; capture the folder itself"
        )
    return name.removeprefix(ROOT)


def _layer(program: ExportedProgram, prefix: str, nodes: list[Node]) -> Layer:
    name = own_name(prefix)
    _check_module(name, prefix, nodes)
    x: Any = nodes[0].args[0]
    value = x.meta["val"]
    packed = packed_linear(program, f"{prefix}.weight")
    if packed.fp8:
        raise ArtifactError(
            f"{name}: its inputs are rounded to FP8, which has no place in a folder of "
            f"pack-quantized weights; compress it with inputs: null, or save a .pt2"
        )
    K, N = int(value.shape[-1]), row_count(packed.weight)
    scheme, tensors, notes = _weight(name, packed, K, value.dtype)
    A, B = _adapter(name, packed, K)
    coded = not isinstance(packed.L, Tensor | None) and packed.L.scale is not None
    if coded and A is not None and B is not None:
        A, B = _exact_half(A), _exact_half(B)
        wide = torch.promote_types(A.dtype, B.dtype)
        notes = (*notes, f"int4 adapters are stored as {str(wide).removeprefix('torch.')}")
    return Layer(
        name=name,
        shape=(N, K),
        layout=layout(packed.weight).name,
        scheme=scheme,
        tensors={f"{name}.{part}": tensor for part, tensor in tensors.items()},
        A=A,
        B=B,
        coded=coded,
        notes=notes,
    )


def _check_module(name: str, prefix: str, nodes: list[Node]) -> None:
    paths = {module_path(node) for node in nodes}
    if paths != {prefix}:
        raise ArtifactError(
            f"{name}: its weight is used by {', '.join(sorted(paths)) or 'no module'}, and a "
            f"folder stores one weight a module; untie the weights before capture, or skip it"
        )
    kinds = {str(list(node.meta["nn_module_stack"].values())[-1][1]) for node in nodes}
    if not all(_MODULE in kind for kind in kinds):
        raise ArtifactError(
            f"{name}: is a {', '.join(sorted(kinds))}; compressed-tensors decompresses "
            f"torch.nn.Linear alone. Add it to the recipe's skip, or export to another target"
        )


def layout(matrix: PackedMatrix) -> Layout:
    """Where the values of a stored matrix are, and their bits."""
    where = {PackedDense: "dense", Packed24: "2:4"}
    return Layout(where.get(type(matrix), "bitmask"), matrix.bits)


_Weight = tuple[Scheme | None, dict[str, Tensor], tuple[str, ...]]


def _weight(name: str, packed: PackedLinear, K: int, dtype: torch.dtype) -> _Weight:
    """Its scheme, its tensors by their last name, and notes."""
    matrix, inputs = packed.weight, packed.input_scale
    if matrix.scale is None:
        weight = stored_values(matrix, K)
        if inputs is not None:
            weight = _scaled(name, weight, inputs, dtype)
        return None, {"weight": weight}, (f"{layout(matrix).name} is stored densely",)
    codes = stored_values(matrix, K)
    bits = max(4, matrix.bits)
    group, scale = _groups(matrix, len(codes), K)
    if inputs is not None:
        scale = _scaled(name, scale, _for_groups(name, inputs, scale.shape[1]), torch.bfloat16)
    tensors = {
        "weight_packed": int_weights.to_words(pack_codes(codes, bits)),
        "weight_scale": scale.to(dtype).contiguous(),
        "weight_shape": torch.tensor([len(codes), K]),
    }
    widened = (f"int{matrix.bits} is widened to int4",) if matrix.bits < bits else ()
    return Scheme(bits, group), tensors, widened


def _groups(matrix: PackedMatrix, N: int, K: int) -> tuple[int | None, Tensor]:
    """Inputs of a group, and the scales [N, groups], each what it is in the program.

    Groups are of 128 inputs where that is possible, which vLLM has kernels for, and end where rows
    do: one that does not divide K is split into groups of their greatest common divisor.
    """
    scale = matrix.scale
    assert scale is not None
    if scale.shape[1] == 1 and K % _GROUP:
        return None, scale.expand(N, 1)
    if scale.shape[1] == 1:
        return _GROUP, scale.expand(N, K // _GROUP)
    common = math.gcd(matrix.group, K)
    group = _GROUP if common % _GROUP == 0 else common
    return group, scale[:, torch.arange(0, K, group) // matrix.group].expand(N, -1)


def _for_groups(name: str, inputs: Tensor, groups: int) -> Tensor:
    """The one factor of each group of inputs."""
    each = inputs.reshape(groups, -1)
    if not (each == each[:, :1]).all():
        raise ArtifactError(
            f"{name}: its inputs are scaled channel by channel (awq, smoothquant), and a folder of "
            f"pack-quantized weights has one scale for {each.shape[1]} of them; compress it "
            f"with transform: null, or export to another target"
        )
    return each[:, 0]


def _scaled(name: str, matrix: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix * factors, in a dtype that must hold it exactly."""
    exact = matrix.double() * factors.double()
    product = exact.to(dtype)
    if not torch.equal(product.double(), exact):
        raise ArtifactError(
            f"{name}: its weight times its input scale is not exact in {dtype}; compress it with "
            f"transform: null, or export to another target"
        )
    return product


def _adapter(name: str, packed: PackedLinear, K: int) -> tuple[Tensor | None, Tensor | None]:
    if packed.L is None or packed.R is None:
        return None, None
    A = int_weights.floats(packed.L, K)
    B = int_weights.floats(packed.R, A.shape[0])
    if packed.input_scale is not None:
        A = _scaled(name, A, packed.input_scale, torch.float32)
    return A.contiguous(), B.contiguous()


def _exact_half(matrix: Tensor) -> Tensor:
    """The matrix as float16, which has the 11 bits of a 4-bit code times a scale, if in range."""
    half = matrix.to(torch.float16)
    return half if torch.equal(half.to(matrix.dtype), matrix) else matrix
