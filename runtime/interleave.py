"""The layout that CPU kernels read: sixteen rows side by side, so that no lanes need adding up.

A matrix [N, K] is cut into tiles of 16 rows (lanes), N and K padded with zeros to multiples of 16.
A tile is, for every 16 inputs,

dense   int32 [16 bits / 32, 16]    codes of one row in a lane
2:4     int32 [8 bits / 32, 16]     the two values of each group of four inputs
        uint16 [16]                 their positions, 2 bits each, ascending
bitmask uint32 [K / 2], once a tile which of 16 rows x 2 inputs stay; bit 16 is the second input
        then, for each of these, the values that stay, in whole bytes

Codes are two's complement of 4 or 8 bits (2 and 3 are widened to 4), floats 16 or 32. In an int32,
the low nibbles of the bytes are codes 0 to 3 and the high ones 4 to 7; a bitmask's come in order.
Scales are bfloat16 [tiles, groups, 16], ones for floats. `dense_weight` is what it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from slimfx.runtime.pack import (
    FLOAT_BITS,
    Packed24,
    PackedBitmask,
    PackedDense,
    PackedMatrix,
    unpack_24,
    unpack_bitmask,
    unpack_bits,
    unpack_codes,
)
from torch import Tensor
from torch.nn.functional import pad

LANES = 16
WHERE = ("dense", "2:4", "bitmask")
"""Where the values of a matrix are; kernels know the place in this tuple."""
_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Which of eight codes each nibble of a word holds; `_PLACES` is the way back."""
_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
_SLACK = 64
"""Bytes after a bitmask tile that a kernel may read and does not use."""


@dataclass(frozen=True)
class Interleaved:
    """A matrix [N, K] as the kernels read it: `data` uint8 [tiles, bytes], `scale` bfloat16
    [tiles, groups, 16]; `group` inputs share a scale, all of them where it is not below K.
    """

    data: Tensor
    scale: Tensor
    where: str
    bits: int
    group: int


def whole(n: int) -> int:
    """n rounded up to a multiple of 16."""
    return -(-n // LANES) * LANES


def why_not(matrix: PackedMatrix | Tensor, K: int) -> str | None:
    """Why no kernel takes a weight [N, K], or None if one does."""
    if isinstance(matrix, Tensor):
        fits = matrix.dtype in (torch.bfloat16, torch.float32)
        return None if fits else f"{matrix.dtype} adapters, not float32 or bfloat16"
    if matrix.scale is None or matrix.scale.shape[1] == 1:
        return None
    if matrix.group % LANES and matrix.group < K:
        return f"groups of {matrix.group} inputs, not a multiple of {LANES}"
    return None


def interleave(matrix: PackedMatrix | Tensor, K: int) -> Interleaved:
    """A stored weight [N, K], or one of floats, in the kernels' layout."""
    weight, stays = _values(matrix, K)
    N = weight.shape[0]
    weight, stays = (pad(part, (0, whole(K) - K, 0, whole(N) - N)) for part in (weight, stays))
    floats = weight.is_floating_point()
    bits = weight.itemsize * 8 if floats else max(4, matrix.bits)  # type: ignore[union-attr]
    where = {PackedDense: "dense", Packed24: "2:4", PackedBitmask: "bitmask"}
    place = where.get(type(matrix), "dense")
    scale, group = _scales(matrix, N, K)
    raw = weight.view({16: torch.int16, 32: torch.int32}[bits]) if floats else weight
    raw = raw.to(torch.int64) & (2**bits - 1)
    return Interleaved(_LAYOUTS[place](raw, stays, bits), scale, place, bits, group)


def _values(matrix: PackedMatrix | Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Codes int8 or floats [N, K], and the bool mask [N, K] of those stored."""
    if isinstance(matrix, Tensor):
        weight = matrix.detach()
        return weight, torch.ones_like(weight, dtype=torch.bool)
    if isinstance(matrix, PackedDense):
        weight = unpack_codes(matrix.codes, matrix.bits, K)
        return weight, torch.ones_like(weight, dtype=torch.bool)
    if isinstance(matrix, Packed24):
        weight = unpack_24(matrix.values, matrix.indices, matrix.bits, K)
        return weight, weight != 0
    return (
        unpack_bitmask(matrix.values, matrix.mask, matrix.bits, K),
        unpack_bits(matrix.mask, K),
    )


def _scales(matrix: PackedMatrix | Tensor, N: int, K: int) -> tuple[Tensor, int]:
    """bfloat16 [tiles, groups, 16], and the inputs of a group."""
    scale = None if isinstance(matrix, Tensor) else matrix.scale
    if scale is None:
        scale = torch.ones(1, 1, dtype=torch.bfloat16)
    group = matrix.group if scale.shape[1] > 1 else whole(K)  # type: ignore[union-attr]
    every = pad(scale.expand(N, -1), (0, 0, 0, whole(N) - N))
    return every.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous(), min(group, whole(K))


def _words(codes: Tensor, bits: int) -> Tensor:
    """int32 [..., n] of `bits` bits each -> int32 [..., n bits / 32]."""
    parts = codes.unflatten(-1, (-1, 32 // bits)).to(torch.int64)
    if bits == 4:
        parts = parts[..., _NIBBLES]
    joined = (parts << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)


def _dense(raw: Tensor, stays: Tensor, bits: int) -> Tensor:
    words = _words(raw.unflatten(1, (-1, 16)), bits)  # [N, K / 16, words]
    return _tiles(words)


def _pairs(raw: Tensor, stays: Tensor, bits: int) -> Tensor:
    groups = stays.unflatten(1, (-1, 4))
    kept = groups.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :2]
    kept = kept.sort(dim=-1).values  # [N, K / 4, 2]
    held = raw.unflatten(1, (-1, 4)).gather(-1, kept).flatten(1).unflatten(1, (-1, 8))
    at = kept.flatten(1).unflatten(1, (-1, 8)).to(torch.int32)
    joined = (at << torch.arange(0, 16, 2, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    places = torch.where(joined >= 2**15, joined - 2**16, joined).to(torch.int16)
    steps = [_tiles(_words(held, bits)).unflatten(1, (places.shape[1], -1))]
    steps.append(_tiles(places[..., None]).unflatten(1, (places.shape[1], -1)))
    return torch.cat(steps, -1).flatten(1)


def _tiles(words: Tensor) -> Tensor:
    """[N, steps, words] of any integer -> uint8 [tiles, bytes], lanes last."""
    lanes = words.unflatten(0, (-1, LANES)).permute(0, 2, 3, 1).contiguous()
    return lanes.view(torch.uint8).flatten(1)


def _bits(raw: Tensor, stays: Tensor, bits: int) -> Tensor:
    pairs, held = _by_pairs(stays), _by_pairs(raw)  # [tiles, K / 2, 32]
    masks = _words(pairs.to(torch.int32), 1)[..., 0].contiguous().view(torch.uint8)
    per_byte = max(1, 8 // bits)
    unit, at = _places(pairs, per_byte)
    size = int(unit.sum(1).max()) if unit.numel() else 0
    flat = raw.new_zeros(len(pairs), size + 1)
    flat.scatter_(
        1, torch.where(pairs, at, size).flatten(1), torch.where(pairs, held, 0).flatten(1)
    )
    flat = flat[:, :size]
    if bits == 4:
        flat = flat[:, ::2] | (flat[:, 1::2] << 4)
    values = flat.to(torch.int16 if bits == FLOAT_BITS else torch.uint8).contiguous()
    return pad(torch.cat([masks, values.view(torch.uint8)], 1), (0, _SLACK))


def _by_pairs(part: Tensor) -> Tensor:
    """[N, K] -> [tiles, K / 2, 32]: sixteen rows of one input, then of the next."""
    tiles = part.unflatten(0, (-1, LANES)).unflatten(2, (-1, 2))
    return tiles.permute(0, 2, 3, 1).flatten(2)


def _places(pairs: Tensor, per_byte: int) -> tuple[Tensor, Tensor]:
    """Room in values [tiles, K / 2] that each pair takes, and the place of each value in a tile."""
    unit = -(-pairs.sum(-1) // per_byte) * per_byte
    start = unit.cumsum(1) - unit
    return unit, start[..., None] + pairs.cumsum(-1) - 1


_LAYOUTS = {"dense": _dense, "2:4": _pairs, "bitmask": _bits}


def dense_weight(matrix: Interleaved, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that the layout stands for: what every kernel is compared with."""
    codes = _CODES[matrix.where](matrix.data, matrix.bits, whole(K))
    scale = matrix.scale.transpose(1, 2).flatten(0, 1).to(dtype)
    scale = scale.repeat_interleave(matrix.group, dim=1)[:, : whole(K)]
    return (codes.to(dtype) * scale)[:N, :K]


def _read(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> the codes in them [..., n 32 / bits], int32 or bfloat16."""
    if bits >= FLOAT_BITS:
        return words.contiguous().view(torch.bfloat16 if bits == FLOAT_BITS else torch.float32)
    up = torch.arange(32 - bits, -1, -bits, dtype=torch.int32)
    codes = (words[..., None] << up) >> (32 - bits)
    return (codes[..., _PLACES] if bits == 4 else codes).flatten(-2)


def _lanes(data: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [tiles, steps, bytes] -> [tiles, 16, steps, words]."""
    return data.contiguous().view(dtype).unflatten(2, (-1, LANES)).permute(0, 3, 1, 2)


def _read_dense(data: Tensor, bits: int, K: int) -> Tensor:
    codes = _read(_lanes(data.unflatten(1, (K // 16, -1)), torch.int32), bits)
    return codes.flatten(2).flatten(0, 1)


def _read_24(data: Tensor, bits: int, K: int) -> Tensor:
    steps = data.unflatten(1, (K // 16, -1))
    held = _read(_lanes(steps[..., :-32], torch.int32), bits).flatten(2).flatten(0, 1)
    places = _lanes(steps[..., -32:], torch.int16).flatten(2).flatten(0, 1)
    at = (places.to(torch.int64)[..., None] >> torch.arange(0, 16, 2)) & 3
    out = held.new_zeros(held.shape[0], K // 4, 4)
    for i in (0, 1):  # an empty group may name one place twice, with zeros
        out.scatter_add_(2, at.flatten(1)[:, i::2, None], held[:, i::2, None])
    return out.flatten(1)


def _read_bitmask(data: Tensor, bits: int, K: int) -> Tensor:
    masks = data[:, : 2 * K].flatten().view(torch.int32).unflatten(0, (len(data), -1))
    pairs = ((masks[..., None] >> torch.arange(32, dtype=torch.int32)) & 1).to(torch.bool)
    stored = data[:, 2 * K : -_SLACK]
    if bits == FLOAT_BITS:
        held = stored.flatten().view(torch.bfloat16).unflatten(0, (len(data), -1))
    elif bits == 8:
        held = stored.to(torch.int8).to(torch.int32)
    else:
        nibbles = torch.stack([stored & 15, stored >> 4], -1).flatten(1).to(torch.int32)
        held = (nibbles ^ 8) - 8
    _, at = _places(pairs, max(1, 8 // bits))
    held = pad(held, (0, 1))
    flat = torch.where(pairs, at, held.shape[1] - 1).flatten(1)
    codes = held.gather(1, flat).unflatten(1, (-1, 2, LANES))
    return codes.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


_CODES = {"dense": _read_dense, "2:4": _read_24, "bitmask": _read_bitmask}
