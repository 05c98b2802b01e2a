"""Bit layouts of compressed weights; each `unpack` is the exact inverse of its `pack`.

A weight [N, K] is stored by where its values are and by how many bits each has:

dense    codes   uint8 [N, ceil(K bits / 8)]
2:4      values  uint8 [N, ceil(K/2 bits / 8)]  the two values of each group of four inputs
         indices uint8 [N, ceil(K / 8)]         their positions: 2 + 2 bits a group, ascending
bitmask  values  uint8 [ceil(kept bits / 8)]    the values that stay, row after row
         mask    uint8 [N, ceil(K / 8)]         one bit an input, lowest first

Codes have 2, 3, 4 or 8 bits, lie in [-top - 1, top] with top = 2^(bits-1) - 1 (slimfx itself makes
none below -top, other libraries do), and are stored as code + top + 1, lowest bits first (at 4
bits: two codes a byte, low nibble first). With bits 16 the values are bfloat16 themselves and there
is no scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CODE_BITS = (2, 3, 4, 8)
FLOAT_BITS = 16


@dataclass(frozen=True)
class Layout:
    """Where the values are ("dense", "2:4", "bitmask") and how many bits each has."""

    where: str
    bits: int

    @property
    def name(self) -> str:
        """As tables show it: "2:4 int4", "bitmask bf16", "int8"."""
        value = "bf16" if self.bits == FLOAT_BITS else f"int{self.bits}"
        return value if self.where == "dense" else f"{self.where} {value}"

    def bytes(self, N: int, K: int, *, kept: int, scales: int) -> int:
        """Stored bytes of a weight [N, K] of which `kept` values stay, with so many scales."""
        values = {
            "dense": N * _bytes(K * self.bits),
            "2:4": N * (_bytes(K // 2 * self.bits) + _bytes(K)),
            "bitmask": _bytes(kept * self.bits) + N * _bytes(K),
        }
        return values[self.where] + (0 if self.bits == FLOAT_BITS else 2 * scales)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def fits_24(n: int, m: int) -> bool:
    """Does n:m sparsity never leave more than two weights in an aligned group of four?"""
    return n == 1 or (n == 2 and m % 4 == 0)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [N, K] -> uint8 [N, ceil(K bits / 8)]; what is left of the last byte is zero
    codes.
    """
    top = 2 ** (bits - 1) - 1
    if codes.numel() and not -top - 1 <= codes.min() <= codes.max() <= top:
        raise AssertionError(f"pack_codes: a code is outside [{-top - 1}, {top}]")
    unit = math.lcm(8, bits)
    short = -codes.shape[1] % (unit // bits)
    padded = torch.nn.functional.pad(codes.to(torch.int32) + top + 1, (0, short), value=top + 1)
    shifts = torch.arange(0, unit, bits, dtype=torch.int32, device=codes.device)
    words = (padded.unflatten(1, (-1, unit // bits)) << shifts).sum(-1, dtype=torch.int32)
    parts = [(words >> shift) & 255 for shift in range(0, unit, 8)]
    packed = torch.stack(parts, -1).flatten(1)
    return packed[:, : _bytes(codes.shape[1] * bits)].to(torch.uint8).contiguous()


def unpack_codes(packed: Tensor, bits: int, width: int) -> Tensor:
    """uint8 [N, ceil(K bits / 8)] -> codes int8 [N, K = width]."""
    unit = math.lcm(8, bits)
    shifts = torch.arange(0, unit, bits, dtype=torch.uint8, device=packed.device)
    if unit == 8:
        words = packed
    else:
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % (unit // 8)))
        parts = padded.unflatten(1, (-1, unit // 8)).to(torch.int32)
        words = (parts << (8 * torch.arange(unit // 8, device=packed.device))).sum(-1)
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return (codes.flatten(1)[:, :width].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _two_of(which: int) -> tuple[int, int]:
    """The positions that are set among four, and the lowest others up to two, in order; -1 where
    more than two are.
    """
    if which.bit_count() > 2:
        return -1, -1
    first, second = sorted(sorted(range(4), key=lambda i: not which >> i & 1)[:2])
    return first, second


_KEPT = [_two_of(which) for which in range(16)]
"""By which of four are not zero, a bit each."""


def pack_24(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 or values bfloat16 [N, K], at most two non-zeros in four -> values, indices.

    K must be a multiple of 4. Groups with fewer non-zeros keep zeros at the lowest free positions.
    """
    groups = weight.unflatten(1, (-1, 4))
    taken = [(lane != 0).view(torch.uint8) << i for i, lane in enumerate(groups.unbind(-1))]
    which = (taken[0] | taken[1] | taken[2] | taken[3]).int()
    kept = torch.tensor(_KEPT, device=weight.device)[which]  # [N, K/4, 2]
    if (kept[..., 0] < 0).any():
        raise AssertionError("pack_24: a group of four holds more than two non-zero values")
    values = _pack_values(groups.gather(-1, kept).flatten(1), bits)
    pairs = (kept[..., 0] | (kept[..., 1] << 2)).to(torch.uint8)
    if pairs.shape[1] % 2:
        pairs = torch.nn.functional.pad(pairs, (0, 1))
    return values, (pairs[:, ::2] | (pairs[:, 1::2] << 4)).contiguous()


def unpack_24(values: Tensor, indices: Tensor, bits: int, width: int) -> Tensor:
    """values and indices as packed -> codes int8, or values bfloat16, [N, K = width]."""
    groups = width // 4
    pairs = torch.stack([indices & 15, indices >> 4], -1).flatten(1)[:, :groups, None]
    lane = torch.arange(4, dtype=torch.uint8, device=values.device)
    both = _unpack_values(values, bits, 2 * groups).unflatten(1, (groups, 2))
    first = ((pairs & 3) == lane) * both[..., :1]
    second = ((pairs >> 2) == lane) * both[..., 1:]
    return (first + second).flatten(1)


def ascending(indices: Tensor, width: int) -> bool:
    """Do the two indices of every group of four ascend, as `pack_24` and the kernels have it?"""
    pairs = torch.stack([indices & 15, indices >> 4], -1).flatten(1)[:, : width // 4]
    return bool(((pairs & 3) < (pairs >> 2)).all())


def pack_bitmask(weight: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 or values bfloat16 [N, K], and the bool mask [N, K] of what stays -> values,
    mask.
    """
    if (weight[~mask] != 0).any():
        raise AssertionError("pack_bitmask: a value outside the mask is not zero")
    return _pack_values(weight[mask][None], bits)[0], pack_bits(mask)


def unpack_bitmask(values: Tensor, mask: Tensor, bits: int, width: int) -> Tensor:
    """values and mask as packed -> codes int8, or values bfloat16, [N, K = width]."""
    stays = unpack_bits(mask, width)
    held = _unpack_values(values[None], bits, values.shape[0] * 8 // bits)[0]
    position = stays.flatten().cumsum(0) - 1  # where a weight that stays has its value
    return held[position.clamp(0, held.shape[0] - 1)].view_as(stays) * stays


def pack_bits(mask: Tensor) -> Tensor:
    """Bool [N, K] -> uint8 [N, ceil(K / 8)], lowest bit first."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """uint8 [N, ceil(K / 8)] -> bool [N, K = width]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed[..., None] >> shifts) & 1).flatten(1)[:, :width]).to(torch.bool)


def _pack_values(values: Tensor, bits: int) -> Tensor:
    return pack_codes(values, bits) if bits < FLOAT_BITS else values.to(torch.bfloat16).contiguous()


def _unpack_values(values: Tensor, bits: int, width: int) -> Tensor:
    return values if bits == FLOAT_BITS else unpack_codes(values, bits, width)


@dataclass(frozen=True)
class PackedDense:
    """A matrix of codes as stored; `scale` bfloat16 [1, 1], [N, 1] or [N, ceil(K / group)]."""

    codes: Tensor
    scale: Tensor
    bits: int
    group: int


@dataclass(frozen=True)
class Packed24:
    """A 2:4-sparse matrix as stored; `scale` as in `PackedDense`, None for bfloat16 values."""

    values: Tensor
    indices: Tensor
    scale: Tensor | None
    bits: int
    group: int


@dataclass(frozen=True)
class PackedBitmask:
    """A sparse matrix of any pattern as stored; `scale` as in `Packed24`."""

    values: Tensor
    mask: Tensor
    scale: Tensor | None
    bits: int
    group: int


PackedMatrix = PackedDense | Packed24 | PackedBitmask


def stored_values(matrix: PackedMatrix, K: int) -> Tensor:
    """Codes int8, or values bfloat16, [N, K] with the zeros of a sparse matrix."""
    if isinstance(matrix, PackedDense):
        return unpack_codes(matrix.codes, matrix.bits, K)
    if isinstance(matrix, Packed24):
        return unpack_24(matrix.values, matrix.indices, matrix.bits, K)
    return unpack_bitmask(matrix.values, matrix.mask, matrix.bits, K)


def row_count(matrix: PackedMatrix | Tensor) -> int:
    """N of a stored matrix [N, K], or of one of floats."""
    if isinstance(matrix, Tensor):
        return matrix.shape[0]
    stored = {PackedDense: "codes", Packed24: "values", PackedBitmask: "mask"}
    return getattr(matrix, stored[type(matrix)]).shape[0]


@dataclass(frozen=True)
class PackedLinear:
    """A compressed linear: y = W x' + R (L x') + bias, x' = x * input_scale, rounded to FP8 if so.

    L [r, K] and R [N, r] are there or not together. `bias` [N] takes the place of the layer's own,
    for a layer that has one.
    """

    weight: PackedMatrix
    L: PackedMatrix | Tensor | None = None
    R: PackedMatrix | Tensor | None = None
    input_scale: Tensor | None = None
    bias: Tensor | None = None
    fp8: bool = False
