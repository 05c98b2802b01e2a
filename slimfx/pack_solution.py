"""The stored form of a solution."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfx.methods.masks import keep
from slimfx.methods.quantized import Quantized
from slimfx.plan import adapter_layout, layout_of
from slimfx.runtime.pack import (
    FLOAT_BITS,
    Layout,
    Packed24,
    PackedBitmask,
    PackedDense,
    PackedLinear,
    PackedMatrix,
    pack_24,
    pack_bitmask,
    pack_codes,
)
from slimfx.solve import Solution
from slimfx.steps import LayerRecipe


def pack_solution(solution: Solution, how: LayerRecipe, bias: Tensor | None = None) -> PackedLinear:
    """The stored form of a solution; `bias` is the layer's own, which a bias shift is added to."""
    weight, shift = solution.weight, solution.bias_shift
    mask = None
    if how.pattern is not None:  # every non-zero value, and zeros up to the number that stays
        values = weight.codes if isinstance(weight, Quantized) else weight
        mask = keep((values != 0).float(), how.pattern)
    shifted = None if bias is None or shift is None else (bias.float() + shift).to(bias.dtype)
    L = R = Layout("dense", FLOAT_BITS)
    if how.adapter is not None:
        L, R = adapter_layout(how.adapter), Layout("dense", how.adapter.bits)
    return PackedLinear(
        weight=_pack(weight, layout_of(how), mask),
        L=None if solution.L is None else _pack_adapter(solution.L, L),
        R=None if solution.R is None else _pack_adapter(solution.R, R),
        input_scale=solution.input_scale,
        bias=shifted,
        fp8=how.inputs is not None,
    )


def _pack_adapter(matrix: Quantized | Tensor, layout: Layout) -> PackedMatrix | Tensor:
    if isinstance(matrix, Tensor) and layout.where == "dense":
        return matrix.clone(memory_format=torch.contiguous_format)
    return _pack(matrix, layout, None)


def _pack(matrix: Quantized | Tensor, layout: Layout, mask: Tensor | None) -> PackedMatrix:
    scale: Tensor | None
    if isinstance(matrix, Quantized):
        values, scale, group = matrix.codes, matrix.scale, matrix.group
    else:
        values, scale, group = matrix, None, matrix.shape[1]
    if layout.where == "2:4":
        return Packed24(*pack_24(values, layout.bits), scale, layout.bits, group)
    if layout.where == "bitmask":
        assert mask is not None
        return PackedBitmask(*pack_bitmask(values, mask, layout.bits), scale, layout.bits, group)
    assert scale is not None
    return PackedDense(pack_codes(values, layout.bits), scale, layout.bits, group)
