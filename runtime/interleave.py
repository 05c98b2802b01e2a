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
    pack_codes,
    unpack_bitmask,
    unpack_bits,
    unpack_codes,
)
from torch import Tensor
from torch.nn.functional import pad

LANES = 16
WHERE = ("dense", "2:4", "bitmask")
"""Where the values of a matrix are; kernels know the place in this tuple."""
_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
"""The nibble of a word that each of its eight codes is in."""
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


def form_of(matrix: PackedMatrix | Tensor, K: int) -> tuple[str, int, int]:
    """`where`, `bits` and `group` that a weight [N, K] has in the kernels' layout."""
    if isinstance(matrix, Tensor):
        return "dense", matrix.itemsize * 8, whole(K)
    where = {PackedDense: "dense", Packed24: "2:4", PackedBitmask: "bitmask"}[type(matrix)]
    grouped = matrix.scale is not None and matrix.scale.shape[1] > 1
    return where, max(4, matrix.bits), min(matrix.group, whole(K)) if grouped else whole(K)


def interleave(matrix: PackedMatrix | Tensor, K: int) -> Interleaved:
    """A stored weight [N, K], or one of floats, in the kernels' layout."""
    where, bits, group = form_of(matrix, K)
    step = 2 * bits  # bytes of sixteen values
    if isinstance(matrix, Tensor):
        N = matrix.shape[0]
        data = _tiles(_bytes(matrix.detach()), step, 4, K)
    elif isinstance(matrix, PackedBitmask):
        N, data = matrix.mask.shape[0], _bitmask(matrix, K)
    elif isinstance(matrix, PackedDense):
        N, data = matrix.codes.shape[0], _tiles(_signed(matrix.codes, matrix.bits, K), step, 4, K)
    else:
        N = matrix.values.shape[0]
        values = _tiles(_signed(matrix.values, matrix.bits, K // 2), step // 2, 4, K)
        data = torch.cat([values, _tiles(matrix.indices, 2, 2, K)], -1)
    scale = None if isinstance(matrix, Tensor) else matrix.scale
    return Interleaved(data.flatten(1), _scales(scale, N), where, bits, group)


def _scales(scale: Tensor | None, N: int) -> Tensor:
    """bfloat16 [1 or N, groups] -> [tiles, groups, 16]."""
    if scale is None:
        scale = torch.ones(1, 1, dtype=torch.bfloat16)
    every = pad(scale.expand(N, -1), (0, 0, 0, whole(N) - N))
    return every.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def _signed(stored: Tensor, bits: int, width: int) -> Tensor:
    """Codes as packed -> two's complement of 4, 8 or 16 bits, uint8 [N, bytes]."""
    if bits == FLOAT_BITS:
        return _bytes(stored)
    if bits == 8:
        return stored ^ 128
    if bits != 4:
        stored = pack_codes(unpack_codes(stored, bits, width), 4)
    words = pad(stored ^ 0x88, (0, -stored.shape[1] % 4)).unflatten(1, (-1, 4))
    first, second = words[..., :2], words[..., 2:]
    return torch.stack([(first & 15) | (second << 4), (first >> 4) | (second & 240)], -1).flatten(1)


def _bytes(floats: Tensor) -> Tensor:
    """Floats [N, K] -> uint8 [N, bytes], whatever their strides (a column may have any)."""
    return floats.reshape(-1).view(torch.uint8).unflatten(0, (len(floats), -1))


def _tiles(stored: Tensor, step: int, word: int, K: int) -> Tensor:
    """uint8 [N, bytes] -> [tiles, whole(K) / 16, 16 step]: a row in a lane, words side by side.

    Args:
        step: bytes of 16 inputs of a row.
        word: bytes that stay together.
    """
    N, have = stored.shape
    padded = pad(stored, (0, whole(K) // 16 * step - have, 0, whole(N) - N))
    words = padded.view({2: torch.int16, 4: torch.int32}[word]).unflatten(1, (-1, step // word))
    lanes = words.unflatten(0, (-1, LANES)).permute(0, 2, 3, 1).contiguous()
    return lanes.flatten(2).view(torch.uint8)


def _bitmask(matrix: PackedBitmask, K: int) -> Tensor:
    bits = max(4, matrix.bits)
    weight = unpack_bitmask(matrix.values, matrix.mask, matrix.bits, K)
    raw = (weight.view(torch.int16) if bits == FLOAT_BITS else weight).to(torch.int32)
    sides = (0, whole(K) - K, 0, whole(len(raw)) - len(raw))
    held = _by_pairs(pad(raw & (2**bits - 1), sides))  # [tiles, K / 2, 32]
    pairs = _by_pairs(pad(unpack_bits(matrix.mask, K), sides))
    masks = _joined(pairs).view(torch.uint8)
    unit, at = _places(pairs, max(1, 8 // bits))
    size = int(unit.sum(1).max()) if unit.numel() else 0
    flat = held.new_zeros(len(pairs), size + 1)
    flat.scatter_(
        1, torch.where(pairs, at, size).flatten(1), torch.where(pairs, held, 0).flatten(1)
    )
    flat = flat[:, :size]
    if bits == 4:
        flat = flat[:, ::2] | (flat[:, 1::2] << 4)
    values = flat.to(torch.int16 if bits == FLOAT_BITS else torch.uint8).contiguous()
    return pad(torch.cat([masks, values.view(torch.uint8)], 1), (0, _SLACK))


def _joined(pairs: Tensor) -> Tensor:
    """Bool [..., 32] -> int32 [...], the first in the lowest bit."""
    words = (pairs.to(torch.int64) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _by_pairs(part: Tensor) -> Tensor:
    """[N, K] -> [tiles, K / 2, 32]: sixteen rows of one input, then of the next."""
    tiles = part.unflatten(0, (-1, LANES)).unflatten(2, (-1, 2))
    return tiles.permute(0, 2, 3, 1).flatten(2)


def _places(pairs: Tensor, per_byte: int) -> tuple[Tensor, Tensor]:
    """Room in values [tiles, K / 2] that each pair takes, and the place of each value in a tile."""
    unit = -(-pairs.sum(-1) // per_byte) * per_byte
    start = unit.cumsum(1) - unit
    return unit, start[..., None] + pairs.cumsum(-1) - 1


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
