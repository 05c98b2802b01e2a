"""Read compressed-tensors' pack-quantized weights: symmetric codes of 4 or 8 bits.

X.weight_packed int32 [N, ceil(K bits / 32)], X.weight_scale [N, K / group], [N, 1] or [1],
X.weight_shape int64 [2]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from slimfx.runtime.checkpoints.linears import (
    BITS,
    ForeignLinear,
    Found,
    as_mapping,
    group_of,
    in_bfloat16,
    take,
    take_floats,
)
from slimfx.runtime.int_weights import from_words, stored_codes
from slimfx.runtime.pack import PackedLinear
from torch import Tensor

from slimfx.errors import ArtifactError

_PACKED = ".weight_packed"
_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_INEXPRESSIBLE = {
    "weight_zero_point": "codes with a zero point",
    "weight_g_idx": "inputs in another order (actorder)",
    "weight_global_scale": "a scale of scales",
    "input_scale": "rounded inputs",
}
"""Parts that slimfx's layouts have no place for."""


def read_pack_quantized(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """The compressed linears of a folder.

    Args:
        settings: the quantization_config.

    Raises:
        ArtifactError: another format, or weights that slimfx's layouts cannot express.
    """
    bits = _bits(settings)
    names = [key.removesuffix(_PACKED) for key in tensors if key.endswith(_PACKED)]
    linears = {name: _linear(name, tensors, bits) for name in names}
    if not linears:
        raise ArtifactError("no tensor of the checkpoint ends in .weight_packed")
    used = frozenset(f"{name}.{part}" for name in linears for part in _PARTS)
    return Found(linears, used)


def _bits(settings: Mapping[str, Any]) -> set[int]:
    """The bits that any group of layers has, after a look at what all groups ask for."""
    groups = as_mapping(settings.get("config_groups"), "quantization_config.config_groups")
    found = set()
    for name, group in groups.items():
        scheme = as_mapping(group, f"config group {name}")
        weights = as_mapping(scheme.get("weights"), f"config group {name}: weights")
        kind = scheme.get("format") or settings.get("format")
        if kind != "pack-quantized":
            raise ArtifactError(f"config group {name}: format {kind!r}, not 'pack-quantized'")
        if scheme.get("input_activations") or scheme.get("output_activations"):
            raise ArtifactError(
                f"config group {name}: rounds activations, which slimfx does for FP8 alone; "
                f"use a weight-only (W4A16, W8A16) checkpoint"
            )
        if weights.get("type") != "int" or weights.get("num_bits") not in BITS:
            raise ArtifactError(
                f"config group {name}: {weights.get('type')} codes of {weights.get('num_bits')} "
                f"bits, not int of {' or '.join(map(str, BITS))}"
            )
        if not weights.get("symmetric"):
            raise ArtifactError(
                f"config group {name}: asymmetric codes; slimfx's have no zero point, use a "
                f"symmetric checkpoint"
            )
        found.add(int(weights["num_bits"]))
    return found


def _linear(name: str, tensors: Mapping[str, Tensor], declared: set[int]) -> ForeignLinear:
    for part, what in _INEXPRESSIBLE.items():
        if f"{name}.{part}" in tensors:
            raise ArtifactError(
                f"{name}: has {part}, {what}, which slimfx's layouts cannot express; quantize "
                f"it symmetrically and without reordering"
            )
    shape = tensors.get(f"{name}.weight_shape")
    if shape is None or shape.dtype not in (torch.int32, torch.int64) or shape.numel() != 2:
        raise ArtifactError(f"{name}.weight_shape: missing, or not two integers")
    if shape.min() < 1:
        raise ArtifactError(f"{name}.weight_shape: {shape.tolist()} is no shape")
    N, K = (int(size) for size in shape.flatten())
    words = take(tensors, f"{name}.weight_packed", torch.int32, N, -1)
    fitting = [bits for bits in sorted(declared) if -(-K * bits // 32) == words.shape[1]]
    if not fitting:
        raise ArtifactError(
            f"{name}.weight_packed: {words.shape[1]} words a row are not those of {K} codes of "
            f"{' or '.join(map(str, sorted(declared)))} bits"
        )
    scale = take_floats(tensors, f"{name}.weight_scale", *_scale_shape(name, tensors, N))
    scale, change = in_bfloat16(name, scale.reshape(-1, scale.shape[-1]))
    bits = fitting[0]
    group = group_of(name, K, scale.shape[1])
    matrix = stored_codes(from_words(words, bits, K), scale, bits=bits, group=group, K=K)
    return ForeignLinear(PackedLinear(matrix), (N, K), change)


def _scale_shape(name: str, tensors: Mapping[str, Tensor], N: int) -> tuple[int, ...]:
    """One scale for all, or rows of them."""
    scale = tensors.get(f"{name}.weight_scale")
    return (1,) if scale is not None and scale.numel() == 1 and N > 1 else (N, -1)
