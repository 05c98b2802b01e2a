"""Bit layouts of compressed weights; each `unpack` is the exact inverse of its `pack`.

Codes are int8 in [-7, 7] and stored as a nibble code + 8, low nibble first.

2:4  values  uint8 [N, K/4]         the two codes of each group of four inputs
     indices uint8 [N, ceil(K/8)]   their positions: 2 + 2 bits a group, ascending, two groups a
     byte
int4 codes   uint8 [N, ceil(K/2)]   two codes a byte
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def fits_24(n: int, m: int) -> bool:
    """Does n:m sparsity never leave more than two weights in an aligned group of four?"""
    return n == 1 or (n == 2 and m % 4 == 0)


def pack_24(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] with at most two non-zeros in each four -> values, indices.

    K must be a multiple of 4. Groups with fewer non-zeros keep zeros at the lowest free positions.
    """
    groups = codes.unflatten(1, (-1, 4))
    if ((groups != 0).sum(-1) > 2).any():
        raise AssertionError("pack_24: a group of four holds more than two non-zero codes")
    kept = (groups != 0).to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :2]
    kept = kept.sort(dim=-1).values  # ascending positions [N, K/4, 2]
    values = pack_nibbles(groups.gather(-1, kept).flatten(1))
    pairs = (kept[..., 0] | (kept[..., 1] << 2)).to(torch.uint8)
    return values, _join_nibbles(pairs)


def unpack_24(values: Tensor, indices: Tensor) -> Tensor:
    """values uint8 [N, K/4], indices uint8 [N, ceil(K/8)] -> codes int8 [N, K]."""
    N, groups = values.shape
    pairs = torch.stack([indices & 15, indices >> 4], -1).flatten(1)[:, :groups, None]
    lane = torch.arange(4, dtype=torch.uint8, device=values.device)
    low = (values & 15).to(torch.int8) - 8
    high = (values >> 4).to(torch.int8) - 8
    first = ((pairs & 3) == lane) * low[..., None]
    second = ((pairs >> 2) == lane) * high[..., None]
    return (first + second).reshape(N, groups * 4)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] -> uint8 [N, ceil(K/2)]; an odd K ends in a zero code."""
    if codes.numel() and codes.abs().max() > 7:
        raise AssertionError("pack_nibbles: a code is outside [-7, 7]")
    return _join_nibbles((codes + 8).to(torch.uint8), fill=8)


def unpack_nibbles(packed: Tensor, width: int) -> Tensor:
    """uint8 [N, ceil(K/2)] -> codes int8 [N, K = width]."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return nibbles[:, :width].to(torch.int8) - 8


def _join_nibbles(nibbles: Tensor, fill: int = 0) -> Tensor:
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=fill)
    return (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).contiguous()


@dataclass(frozen=True)
class Packed24:
    """A 2:4-sparse int4 weight as stored; `scale` bfloat16 [1, 1], [N, 1] or [N, K / group]."""

    values: Tensor
    indices: Tensor
    scale: Tensor


@dataclass(frozen=True)
class PackedInt4:
    """A dense int4 matrix as stored; `scale` bfloat16 [1, 1], [N, 1] or [N, ceil(K / group)]."""

    codes: Tensor
    scale: Tensor
    group: int


@dataclass(frozen=True)
class PackedLinear:
    """A compressed linear: the weight, and the adapter L [r, K], R [N, r] where there is one."""

    weight: Packed24 | PackedInt4
    L: PackedInt4 | Tensor | None
    R: PackedInt4 | Tensor | None


def bytes_24(N: int, K: int, scales: int) -> int:
    """Stored bytes of a 2:4 weight [N, K] with so many scales."""
    return N * (K // 4) + N * -(-K // 8) + 2 * scales


def bytes_int4(N: int, K: int, scales: int) -> int:
    """Stored bytes of a dense int4 matrix [N, K] with so many scales."""
    return N * -(-K // 2) + 2 * scales
