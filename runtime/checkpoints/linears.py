"""What a reader of a foreign checkpoint found, and the rules that all of them follow.

Codes are kept bit for bit. Scales become bfloat16, which is what slimfx stores and what its kernels
read; where that rounds, the largest change is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from slimfx.runtime.int_weights import is_24
from slimfx.runtime.pack import (
    FLOAT_BITS,
    Packed24,
    PackedBitmask,
    PackedLinear,
    pack_24,
    pack_bitmask,
)
from torch import Tensor

from slimfx.errors import ArtifactError

BITS = (4, 8)
"""Bits of the codes that are read."""


@dataclass(frozen=True)
class ForeignLinear:
    """A compressed linear [N, K] of a checkpoint."""

    packed: PackedLinear
    shape: tuple[int, int]
    change: float = 0.0
    """Largest relative change of a scale, where bfloat16 does not hold it."""


@dataclass(frozen=True)
class Found:
    """The compressed linears of a checkpoint, by module."""

    linears: Mapping[str, ForeignLinear]
    used: frozenset[str]
    """The tensors they were made from; all others are ordinary parameters."""
    notes: tuple[str, ...] = ()


def take(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """The tensor of a name, which must be of a dtype and shape (-1 for any size).

    Raises:
        ArtifactError: it is missing or another one.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise ArtifactError(f"{name}: missing from the checkpoint")
    if tensor.dtype is not dtype or not _fits(tensor, shape):
        raise ArtifactError(
            f"{name}: is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
        )
    return tensor


def take_floats(tensors: Mapping[str, Tensor], name: str, *shape: int) -> Tensor:
    """As `take`, of any floating-point dtype, finite and not empty."""
    tensor = tensors.get(name)
    dtype = torch.float32 if tensor is None or not tensor.is_floating_point() else tensor.dtype
    found = take(tensors, name, dtype, *shape)
    if not found.numel() or not found.isfinite().all():
        raise ArtifactError(f"{name}: holds values that are not finite, or none")
    return found


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    sizes = zip(shape, tensor.shape)
    return tensor.dim() == len(shape) and all(wanted in (-1, size) for wanted, size in sizes)


def adapter(name: str, matrix: Tensor) -> Tensor:
    """A matrix of an adapter in a dtype that slimfx's kernels read: float16 becomes float32."""
    if not matrix.isfinite().all():
        raise ArtifactError(f"{name}: its adapter, times its factor, is beyond {matrix.dtype}")
    wide = matrix.float() if matrix.dtype is torch.float16 else matrix
    return wide.contiguous()


def in_bfloat16(name: str, scale: Tensor) -> tuple[Tensor, float]:
    """A scale as slimfx stores it, and its largest relative change."""
    rounded = scale.to(torch.bfloat16)
    if not rounded.isfinite().all():
        raise ArtifactError(f"{name}: a scale is beyond the range of bfloat16")
    exact = scale.double()
    gap = (rounded.double() - exact).abs() / exact.abs().clamp(min=1e-300)
    return rounded, gap.max().item() if gap.numel() else 0.0


def checked_bits(value: Any, where: str) -> int:
    """The bits of codes that a checkpoint declares."""
    if value not in BITS:
        raise ArtifactError(f"{where} is {value!r}, not {' or '.join(map(str, BITS))}")
    return int(value)


def group_of(name: str, K: int, groups: int) -> int:
    """Inputs that share a scale, where K of them have so many."""
    if groups < 1 or K % groups:
        raise ArtifactError(f"{name}: {groups} scales a row do not divide its {K} inputs")
    return K // groups


def stored_floats(name: str, weight: Tensor) -> Packed24 | PackedBitmask:
    """A weight of floats that has an adapter: 2:4 if its zeros allow that, else a bitmask.

    Raises:
        ArtifactError: bfloat16 does not hold it.
    """
    rounded = weight.to(torch.bfloat16)
    if not torch.equal(rounded.to(weight.dtype), weight):
        raise ArtifactError(
            f"{name}: its {weight.dtype} weight has an adapter and no exact bfloat16 form, which "
            f"slimfx stores such weights in; convert the checkpoint to bfloat16, or merge "
            f"the adapter into it"
        )
    if is_24(rounded):
        return Packed24(*pack_24(rounded, FLOAT_BITS), None, FLOAT_BITS, rounded.shape[1])
    mask = rounded != 0
    packed = pack_bitmask(rounded, mask, FLOAT_BITS)
    return PackedBitmask(*packed, None, FLOAT_BITS, rounded.shape[1])


def as_mapping(value: Any, what: str) -> Mapping[str, Any]:
    """`value`, which must be a JSON mapping."""
    if not isinstance(value, Mapping):
        raise ArtifactError(f"{what} is {value!r}, not a mapping")
    return value
