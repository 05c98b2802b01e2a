"""Integer weights in the bytes that slimfx, compressed-tensors and GPTQ have in common.

All three store a symmetric code as code + 2^(bits-1), lowest bits first, along the inputs: slimfx
in bytes [N, ceil(K bits / 8)], compressed-tensors in int32 words [N, ceil(K bits / 32)] and GPTQ in
the transpose of these. slimfx itself never makes the lowest code (-8 at 4 bits); others do, and it
is kept.
"""

from __future__ import annotations

import torch
from slimfx.runtime.pack import (
    Packed24,
    PackedDense,
    PackedMatrix,
    pack_24,
    stored_values,
    unpack_codes,
)
from torch import Tensor

WORD = 4
"""Bytes of an int32."""


def to_words(stored: Tensor) -> Tensor:
    """uint8 [N, bytes] -> int32 [N, ceil(bytes / 4)], as compressed-tensors has them."""
    whole = torch.nn.functional.pad(stored, (0, -stored.shape[1] % WORD))
    return whole.contiguous().view(torch.int32)


def from_words(words: Tensor, bits: int, K: int) -> Tensor:
    """int32 [N, ceil(K bits / 32)] -> uint8 [N, ceil(K bits / 8)]."""
    return words.contiguous().view(torch.uint8)[:, : -(-K * bits // 8)].contiguous()


def floats(matrix: PackedMatrix | Tensor, K: int) -> Tensor:
    """A stored matrix in a dtype that holds it: its own, or float32 where it has a scale."""
    if isinstance(matrix, Tensor):
        return matrix.detach()
    held = stored_values(matrix, K)
    return held if matrix.scale is None else held.float() * spread(matrix.scale, matrix.group, K)


def spread(scale: Tensor, group: int, K: int) -> Tensor:
    """A scale as float32, one for every input where inputs differ."""
    wide = scale if scale.shape[1] == 1 else scale.repeat_interleave(group, dim=1)[:, :K]
    return wide.float()


def is_24(weight: Tensor) -> bool:
    """Has no group of four inputs more than two values that are not zero?"""
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def stored_codes(
    stored: Tensor, scale: Tensor, *, bits: int, group: int, K: int
) -> Packed24 | PackedDense:
    """uint8 [N, K bits / 8] as a matrix of slimfx: 2:4 where its zeros allow that.

    Scales that are equal all over, or all along the rows, are stored once.
    """
    scale, codes = _narrow(scale), unpack_codes(stored, bits, K)
    if not is_24(codes):
        return PackedDense(stored, scale, bits, group)
    return Packed24(*pack_24(codes, bits), scale, bits, group)


def _narrow(scale: Tensor) -> Tensor:
    if scale.numel() and (scale == scale[:1, :1]).all():
        return scale[:1, :1].contiguous()
    if (scale == scale[:, :1]).all():
        return scale[:, :1].contiguous()
    return scale.contiguous()
