"""Integer weights in the bytes that slimfx, compressed-tensors and GPTQ have in common.

All three store a symmetric code as code + 2^(bits-1), lowest bits first, along the inputs: slimfx
in bytes [N, ceil(K bits / 8)], compressed-tensors in int32 words [N, ceil(K bits / 32)] and GPTQ in
the transpose of these. slimfx itself never makes the lowest code (-8 at 4 bits); others do, and it
is kept.
"""

from __future__ import annotations

import torch
from slimfx.runtime.pack import (
    FLOAT_BITS,
    Packed24,
    PackedBitmask,
    PackedDense,
    PackedMatrix,
    pack_24,
    unpack_24,
    unpack_bitmask,
    unpack_codes,
)
from torch import Tensor

WORD = 4
"""Bytes of an int32."""


def code_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [N, K] of 4 or 8 bits -> uint8 [N, ceil(K bits / 8)], the lowest code included."""
    per_byte = 8 // bits
    middle = 2 ** (bits - 1)
    short = -codes.shape[1] % per_byte
    raw = torch.nn.functional.pad(codes.to(torch.int16) + middle, (0, short), value=middle)
    shifts = torch.arange(0, 8, bits, dtype=torch.int16)
    return (raw.unflatten(1, (-1, per_byte)) << shifts).sum(-1).to(torch.uint8)


def to_words(stored: Tensor) -> Tensor:
    """uint8 [N, bytes] -> int32 [N, ceil(bytes / 4)], as compressed-tensors has them."""
    whole = torch.nn.functional.pad(stored, (0, -stored.shape[1] % WORD))
    return whole.contiguous().view(torch.int32)


def from_words(words: Tensor, bits: int, K: int) -> Tensor:
    """int32 [N, ceil(K bits / 32)] -> uint8 [N, ceil(K bits / 8)]."""
    return words.contiguous().view(torch.uint8)[:, : -(-K * bits // 8)].contiguous()


def values(matrix: PackedMatrix, K: int) -> Tensor:
    """The codes int8, or values bfloat16, [N, K] of a stored matrix."""
    if isinstance(matrix, PackedDense):
        return unpack_codes(matrix.codes, matrix.bits, K)
    if isinstance(matrix, Packed24):
        return unpack_24(matrix.values, matrix.indices, matrix.bits, K)
    return unpack_bitmask(matrix.values, matrix.mask, matrix.bits, K)


def rows(matrix: PackedMatrix | Tensor) -> int:
    """N of a stored matrix [N, K]."""
    if isinstance(matrix, Tensor):
        return matrix.shape[0]
    stored = {PackedDense: "codes", Packed24: "values", PackedBitmask: "mask"}
    return getattr(matrix, stored[type(matrix)]).shape[0]


def floats(matrix: PackedMatrix | Tensor, K: int) -> Tensor:
    """A stored matrix in a dtype that holds it: its own, or float32 where it has a scale."""
    if isinstance(matrix, Tensor):
        return matrix.detach()
    held = values(matrix, K)
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
    kept, indices = pack_24(codes.to(torch.bfloat16), FLOAT_BITS)  # exact, the lowest code too
    return Packed24(code_bytes(kept.to(torch.int8), bits), indices, scale, bits, group)


def _narrow(scale: Tensor) -> Tensor:
    if scale.numel() and (scale == scale[:1, :1]).all():
        return scale[:1, :1].contiguous()
    if (scale == scale[:, :1]).all():
        return scale[:, :1].contiguous()
    return scale.contiguous()
