"""The layout that GPU decode kernels read: weights as the lanes of a warp hold them.

Tensor cores multiply a weight of 16 rows as operand A, so a matrix [N, K] is cut into tiles of 16
rows, and a tile along K into blocks, both padded with zero codes. Lane 4 g + t of a warp holds, as
one word for each product, eight codes (+ 8, four bits each): nibble 4 i + 2 e + h has row g + 8 h
and column 2 t + i + 8 e of the product's sixteen, so that (word >> 4 j) & 0x000f000f are the two
numbers of A register j. A block is int32

dense   [32 lanes, 4]       four products of 16 inputs, 64 inputs in all
2:4     [2, 32 lanes, 4]    eight products of 16 values that stay, of 32 inputs each
        [32 lanes, 4]       where they stay in products 2 w (lanes 4 g, 4 g + 1) and 2 w + 1 (the
                            others) for w < 4; even lanes have the first 16 inputs of the 32, odd
                            ones the last; row g is in the low half, row g + 8 in the high one,
                            two ascending positions for each four inputs

Scales are bfloat16 [tiles, groups, 16], rows g and g + 8 side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from slimfx.runtime.pack import (
    Packed24,
    PackedDense,
    PackedMatrix,
    unpack_codes,
)
from torch import Tensor
from torch.nn.functional import pad

ROWS = 16
BLOCK = {"dense": 64, "2:4": 256}
"""Inputs of a block."""
GROUP = 32
"""Groups of inputs that share a scale are multiples of it."""
_Q = 128
"""Words that hold four products."""
_EMPTY = 4
"""Positions 0 and 1: what a group of four without weights stores."""


@dataclass(frozen=True)
class Fragments:
    """A matrix [N, K] as the kernels read it: `data` int32 [tiles, words], `scale` bfloat16
    [tiles, groups, 16]; `group` inputs share a scale, all of them where it is K.
    """

    data: Tensor
    scale: Tensor
    where: str
    N: int
    K: int
    group: int


def why_not(matrix: PackedMatrix | Tensor, K: int) -> str | None:
    """Why no decode kernel takes a weight [N, K], or None if one does."""
    if isinstance(matrix, Tensor) or not isinstance(matrix, PackedDense | Packed24):
        kind = f"{matrix.dtype} numbers" if isinstance(matrix, Tensor) else "a bitmask"
        return f"{kind}, not 2:4 or dense codes"
    if matrix.scale is None or matrix.bits > 4:
        return f"values of {matrix.bits} bits, more than 4"
    if matrix.scale.shape[1] > 1 and matrix.group % GROUP:
        return f"groups of {matrix.group} inputs, not a multiple of {GROUP}"
    if isinstance(matrix, Packed24) and not _ascend(_pairs(matrix, K)):
        return "positions of 2:4 values that do not ascend"
    return None


def fragments(matrix: PackedMatrix | Tensor, K: int) -> Fragments:
    """A stored weight [N, K] in the kernels' layout."""
    reason = why_not(matrix, K)
    if reason is not None or not isinstance(matrix, PackedDense | Packed24):
        raise AssertionError(f"fragments: {reason}")
    assert matrix.scale is not None  # see `why_not`
    if isinstance(matrix, Packed24):
        where, kept = "2:4", unpack_codes(matrix.values, matrix.bits, K // 2)
        words = _products(_whole(kept, BLOCK[where] // 2))
        q = words.unflatten(1, (-1, 8)).unflatten(2, (2, 4)).transpose(3, 4)
        blocks = torch.cat([q.flatten(2), _positions(_pairs(matrix, K)).flatten(2)], 2)
    else:
        where, kept = "dense", unpack_codes(matrix.codes, matrix.bits, K)
        words = _products(_whole(kept, BLOCK[where]))
        blocks = words.unflatten(1, (-1, 4)).transpose(2, 3).flatten(2)
    N = kept.shape[0]
    scale, group = _scales(matrix.scale, matrix.group, N, K, BLOCK[where])
    return Fragments(blocks.flatten(1).contiguous(), scale, where, N, K, group)


def _whole(codes: Tensor, columns: int, value: int = 0) -> Tensor:
    """Padded to whole tiles and blocks."""
    N, K = codes.shape
    return pad(codes, (0, -K % columns, 0, -N % ROWS), value=value)


def _pairs(matrix: Packed24, K: int) -> Tensor:
    """Two positions of 2 bits for each four inputs, uint8 [N, K / 4]."""
    both = torch.stack([matrix.indices & 15, matrix.indices >> 4], -1)
    return both.flatten(1)[:, : K // 4]


def _ascend(pairs: Tensor) -> bool:
    return bool(((pairs & 3) < (pairs >> 2)).all())


def _products(codes: Tensor) -> Tensor:
    """Codes [16 tiles, 16 products] -> int32 [tiles, products, 32 lanes]."""
    parts = (codes.to(torch.int32) + 8).unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 2, 4, 2))
    # [tile, h, g, product, e, t, i] -> [tile, product, g, t, i, e, h]
    return _joined(parts.permute(0, 3, 2, 5, 6, 4, 1).flatten(2, 3).flatten(3))


def _positions(pairs: Tensor) -> Tensor:
    """Positions [N, K / 4] -> int32 [tiles, blocks, 32 lanes, 4]."""
    whole = _whole(pairs, BLOCK["2:4"] // 4, _EMPTY).to(torch.int32)
    parts = whole.unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 4, 2, 2, 4))
    # [tile, h, g, block, w, f, half, four] -> [tile, block, g, f, half, w, h, four]
    return _joined(parts.permute(0, 3, 2, 5, 6, 4, 1, 7).flatten(2, 4).flatten(4))


def _joined(nibbles: Tensor) -> Tensor:
    """int32 [..., 8] of 4 bits each -> int32 [...], lowest first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=nibbles.device)
    return (nibbles << shifts).sum(-1, dtype=torch.int32)


def _scales(scale: Tensor, group: int, N: int, K: int, block: int) -> tuple[Tensor, int]:
    """bfloat16 [tiles, groups, 16], and the inputs of a group."""
    if scale.shape[1] == 1:
        group, groups = K, 1
    else:  # kernels look up those of the padded inputs too
        groups = -(-(-(-K // block) * block) // group)
    every = pad(scale.expand(N, -1), (0, groups - scale.shape[1], 0, -N % ROWS))
    rows = every.unflatten(0, (-1, 2, 8))  # [tile, h, g, group]
    return rows.permute(0, 3, 2, 1).flatten(2).contiguous(), group


def stacked(parts: Sequence[Fragments]) -> Fragments:
    """Matrices of one K one below the other, each from a new tile on, as one."""
    first = parts[0]
    odd = [p for p in parts if (p.where, p.K, p.group) != (first.where, first.K, first.group)]
    if odd:
        raise AssertionError(f"stacked: {odd[0].where} of {odd[0].K} inputs below {first.where}")
    tiles = sum(part.data.shape[0] for part in parts)
    short = parts[-1].data.shape[0] * ROWS - parts[-1].N
    data, scale = (torch.cat([getattr(p, name) for p in parts]) for name in ("data", "scale"))
    return replace(first, data=data, scale=scale, N=tiles * ROWS - short)


def dense_codes(matrix: Fragments) -> Tensor:
    """The codes int8 [N, K] that the layout stands for."""
    blocks = matrix.data.unflatten(1, (-1, _Q * (3 if matrix.where == "2:4" else 1)))
    if matrix.where == "dense":
        words = blocks.unflatten(2, (32, 4)).transpose(2, 3).flatten(1, 2)
        return _read_products(words)[: matrix.N, : matrix.K]
    q = blocks[..., : 2 * _Q].unflatten(2, (2, 32, 4)).transpose(3, 4)
    kept = _read_products(q.flatten(1, 3)).unflatten(1, (-1, 2))
    pairs = _read_positions(blocks[..., 2 * _Q :].unflatten(2, (32, 4)))
    out = kept.new_zeros(*kept.shape[:2], 4)
    for i in (0, 1):
        out.scatter_(2, ((pairs >> (2 * i)) & 3)[..., None].to(torch.int64), kept[..., i, None])
    return out.flatten(1)[: matrix.N, : matrix.K]


def _read_products(words: Tensor) -> Tensor:
    """The inverse of `_products`, int8."""
    parts = _nibbles(words).unflatten(3, (2, 2, 2)).unflatten(2, (8, 4))
    # [tile, product, g, t, i, e, h] -> [tile, h, g, product, e, t, i]
    codes = parts.permute(0, 6, 2, 1, 5, 3, 4).flatten(3).flatten(0, 2)
    return (codes - 8).to(torch.int8)


def _read_positions(words: Tensor) -> Tensor:
    """The inverse of `_positions`."""
    parts = _nibbles(words).unflatten(4, (2, 4)).unflatten(2, (8, 2, 2))
    # [tile, block, g, f, half, w, h, four] -> [tile, h, g, block, w, f, half, four]
    return parts.permute(0, 6, 2, 1, 5, 3, 4, 7).flatten(3).flatten(0, 2)


def _nibbles(words: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts) & 15


def dense_weight(matrix: Fragments, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that the layout stands for: what every kernel is compared with."""
    rows = matrix.scale.unflatten(2, (8, 2)).permute(0, 3, 2, 1).flatten(0, 2).to(dtype)
    scale = rows.repeat_interleave(matrix.group, dim=1)[: matrix.N, : matrix.K]
    return dense_codes(matrix).to(dtype) * scale
