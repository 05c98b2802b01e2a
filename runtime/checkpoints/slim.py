"""Read what the SLiM paper's own code saves (arXiv 2410.09615; args.json beside the weights).

    X.weight                      bfloat16 [N, K]: codes / f, or codes * f / 7 in groups, rounded
    X.quantization_scaling_factor f [1, 1] = 7 / peak, or [N, K / group] = peaks
    X.lora_left  [K, r], X.lora_right [r, N]: y += x @ left @ right / r

Codes are found again by dividing; one far from a whole number is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from slimfx.runtime.checkpoints.linears import (
    ForeignLinear,
    Found,
    adapter,
    group_of,
    in_bfloat16,
    stored_floats,
    take_floats,
)
from slimfx.runtime.int_weights import is_24, spread, stored_codes
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedLinear, pack_codes
from torch import Tensor

from slimfx.errors import ArtifactError

FACTOR = ".quantization_scaling_factor"
LEFT, RIGHT = ".lora_left", ".lora_right"
_UNUSED = (".lora_left_quantization_scaling_factor", ".lora_right_quantization_scaling_factor")
"""Adapters are stored as the bfloat16 values that their codes stand for."""
_BITS = 4
"""Of the codes that can be found again: bfloat16 moves the largest one by 1/32 of a step at most,
that of 8 bits by 1/2.
"""
_TOP = 2 ** (_BITS - 1) - 1
_NEAR = 0.1
"""How far from whole numbers, in steps, two or three such roundings may have moved a code."""


def read_slim(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """The compressed linears of a folder.

    Args:
        settings: args.json.

    Raises:
        ArtifactError: weights that are not codes times scales, or that slimfx cannot express.
    """
    if settings.get("scale_important_weights"):
        raise ArtifactError(
            "the checkpoint was made with scale_important_weights, which it does not say the "
            "columns of; make it again without"
        )
    linears = {}
    for name in _modules(tensors):
        matrix, change = _matrix(name, settings, tensors)
        N, K = tensors[f"{name}.weight"].shape
        packed = PackedLinear(matrix, *_adapter(name, tensors, N, K))
        linears[name] = ForeignLinear(packed, (N, K), change)
    if not linears:
        raise ArtifactError(
            "no weight of the checkpoint is quantized, 2:4-sparse or has an adapter; read it with "
            "slimfx.capture"
        )
    parts = (".weight", FACTOR, LEFT, RIGHT, *_UNUSED)
    used = frozenset(f"{name}{part}" for name in linears for part in parts)
    inputs = "args.json asks for rounded inputs (quantize_input), which is left out"
    return Found(linears, used, (inputs,) if settings.get("quantize_input") else ())


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Modules with a scaling factor, an adapter, or a 2:4-sparse weight."""
    parts = (FACTOR, LEFT, RIGHT)
    found = [k.removesuffix(part) for k in tensors for part in parts if k.endswith(part)]
    weights = {k.removesuffix(".weight"): t for k, t in tensors.items() if k.endswith(".weight")}
    found += [name for name, weight in weights.items() if _is_sparse(weight)]
    return list(dict.fromkeys(found))


def _is_sparse(weight: Tensor) -> bool:
    fits = weight.dim() == 2 and weight.dtype is torch.bfloat16
    return fits and is_24(weight) and bool(weight.any())


def _matrix(
    name: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[PackedDense | Packed24 | PackedBitmask, float]:
    """The weight of a module, and the largest relative change of its scales."""
    weight = take_floats(tensors, f"{name}.weight", -1, -1)
    if f"{name}{FACTOR}" not in tensors:
        return stored_floats(name, weight), 0.0
    if settings.get("bitwidth") != _BITS:
        raise ArtifactError(
            f"{name}: args.json says codes of {settings.get('bitwidth')!r} bits, not {_BITS}; "
            f"those of more bits cannot be told from bfloat16 weights"
        )
    N, K = weight.shape
    steps = _steps(name, tensors, N)
    group = group_of(name, K, steps.shape[1])
    codes = _codes(name, weight, spread(steps, group, K))
    scale, change = in_bfloat16(name, steps)
    stored = pack_codes(codes, _BITS)
    return stored_codes(stored, scale, bits=_BITS, group=group, K=K), change


def _steps(name: str, tensors: Mapping[str, Tensor], N: int) -> Tensor:
    """What a code is multiplied by: float32 [1, 1] or [N, groups]."""
    factor = take_floats(tensors, f"{name}{FACTOR}", -1, -1).float()
    if factor.shape == (1, 1):
        return 1 / factor
    if factor.shape[0] != N:
        raise ArtifactError(
            f"{name}: scaling factors {list(factor.shape)} for {N} outputs: groups of outputs, "
            f"which slimfx's layouts cannot express; make it again with column_wise_grouping"
        )
    return factor / _TOP


def _codes(name: str, weight: Tensor, steps: Tensor) -> Tensor:
    """The whole numbers that the weight is multiples of `steps` by."""
    ratio = torch.where(steps != 0, weight.float() / steps, 0.0)
    codes = ratio.round()
    off = (ratio - codes).abs().max().item() if codes.numel() else 0.0
    if not off <= _NEAR or codes.min() < -_TOP - 1 or codes.max() > _TOP:
        raise ArtifactError(
            f"{name}: its weight is not {_BITS}-bit codes times its scaling factor (off by "
            f"{off:.2f} of a step, codes from {codes.min():.0f} to {codes.max():.0f}); it was "
            f"changed after it was quantized"
        )
    return codes.to(torch.int8)


def _adapter(
    name: str, tensors: Mapping[str, Tensor], N: int, K: int
) -> tuple[Tensor | None, Tensor | None]:
    """L = left^T and R = right^T / r, in float32 where bfloat16 does not hold it."""
    if f"{name}{LEFT}" not in tensors and f"{name}{RIGHT}" not in tensors:
        return None, None
    left = take_floats(tensors, f"{name}{LEFT}", K, -1)
    right = take_floats(tensors, f"{name}{RIGHT}", left.shape[1], N)
    R = right.T.float() / left.shape[1]
    small = R.to(torch.bfloat16)
    exact = torch.equal(small.float(), R)
    return adapter(name, left.T), adapter(name, small if exact else R)
