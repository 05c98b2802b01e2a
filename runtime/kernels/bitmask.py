"""A product with a sparse weight of any pattern, on any GPU that Triton knows.

    y = x W^T + bias, up to 16 rows of x at a time and more

The values that stay lie one after the other, so each row, and each block of its inputs, needs to
know where its own begin. Within a block the places follow from the mask: a sum over its words, over
the bytes of each and over their bits.
"""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from slimfx.runtime.kernels.portable import (
    BLOCK,
    How,
    Low,
    Operand,
    add_product,
    as_words,
    block_of,
    check_group,
    check_sizes,
    product,
    share,
)
from slimfx.runtime.kernels.portable_int4 import complete, joined
from slimfx.runtime.pack import FLOAT_BITS, PackedBitmask, unpack_bits
from torch import Tensor

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")

_WORD = 32
"""Inputs of a word of the mask."""


@dataclass(frozen=True)
class Bits:
    """A weight [N, K] as the kernel reads it.

    `values` is int32, the `size` bytes that are stored and two words or so more, or bfloat16 as
    stored; `mask` int32 [N, K / 32] has K padded to a multiple of 128; `rows` int64 [N] counts
    values before a row, `blocks` int32 [N, K / block] those of the row before a block of inputs.
    `scale` is one 1 for bfloat16 values.
    """

    values: Tensor
    size: int
    mask: Tensor
    rows: Tensor
    blocks: Tensor
    scale: Tensor
    bits: int
    K: int
    group: int


def bits_of(packed: PackedBitmask, K: int) -> Bits:
    """A stored weight [N, K] with what the kernel needs to find its values; `packed_bits` is the
    way back.

    Raises:
        SlimError: fewer values are stored than the mask says, or arrays have other shapes.
    """
    scale, values, size = packed.scale, packed.values, packed.values.numel()
    check_sizes("bitmask", {packed.mask: -(-K // 8)}, scale, packed.group, K)
    if scale is None:
        scale = torch.ones(1, 1, dtype=torch.bfloat16, device=values.device)
    else:  # a kernel reads two words from where a value begins, even where none is left
        values = torch.nn.functional.pad(values, (0, 8 + -size % 4)).view(torch.int32)
    width = -(-K // BLOCK) * BLOCK // 8
    mask = torch.nn.functional.pad(packed.mask, (0, width - packed.mask.shape[1]))
    stays = unpack_bits(mask, width * 8).unflatten(1, (-1, inputs_of(scale, packed.group)))
    kept = stays.sum(-1)  # int64 [N, blocks]
    total, held = int(kept.sum()), size if packed.bits == FLOAT_BITS else size * 8 // packed.bits
    if total > held:
        raise SlimError(f"bitmask: {total} values stay and {held} are stored; pack it again")
    rows, blocks = kept.sum(1), (kept.cumsum(1) - kept).to(torch.int32)
    places = (as_words(mask, torch.int32), rows.cumsum(0) - rows, blocks.contiguous())
    return Bits(values, size, *places, scale, packed.bits, K, packed.group)


def packed_bits(weight: Bits) -> PackedBitmask:
    """The stored weight that `bits_of` was given."""
    mask = weight.mask.view(torch.uint8)[:, : -(-weight.K // 8)].contiguous()
    if weight.bits == FLOAT_BITS:
        return PackedBitmask(weight.values, mask, None, FLOAT_BITS, weight.group)
    values = weight.values.view(torch.uint8)[: weight.size].clone()
    return PackedBitmask(values, mask, weight.scale, weight.bits, weight.group)


def inputs_of(scale: Tensor, group: int) -> int:
    """Inputs of a block."""
    inputs = block_of(scale, group)
    return inputs if inputs % _WORD == 0 else BLOCK


def bitmask(
    x: Tensor,
    weight: Bits,
    bias: Tensor | None = None,
    *,
    how: How | None = None,
    low: Low | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] W^T [+ z R^T] + bias in the dtype of x, 16 or 32 bits wide.

    Raises:
        SlimError: groups end within what a tensor core takes at once, or x does not fit.
    """
    check_group("bitmask", weight.scale, weight.group, _WORD)
    tensors = (weight.values, weight.mask, weight.rows, weight.blocks)
    N = weight.mask.shape[0]
    constants = {"BITS": weight.bits}
    operand = Operand(tensors, weight.scale, N, weight.K, weight.group, constants)
    return product(product_kernel, x, operand, bias, how, low)


@triton.jit
def row_start(values, rows, row, BITS: tl.constexpr):
    """Pointer to a row's first value, or to the start of the words it is in; values between."""
    start = tl.load(rows + row)
    if BITS == 16:
        return values + start, (start & 0).to(tl.int32)
    else:  # thirty-two values fill whole words
        return values + (start >> 5) * BITS, (start & 31).to(tl.int32)


@triton.jit
def _next(values, number, BITS: tl.constexpr):
    """The 32 bits from value `number` on."""
    bit = number * BITS
    at = values + (bit >> 5)
    low, high = tl.load(at).to(tl.uint32, bitcast=True), tl.load(at + 1)
    both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    return (both >> (bit & 31).to(tl.uint64)).to(tl.uint32)


@triton.jit
def _taken(left, byte, j: tl.constexpr, BITS: tl.constexpr):
    """The weight of bit j of mask bytes, and the bits that are left for the next ones."""
    # A power of two is one bit, shifted.
    used = ((byte >> j) & 1) * 3 if BITS == 3 else ((byte * BITS) >> j) & BITS
    code = tl.where(used != 0, left & ((1 << BITS) - 1), 1 << (BITS - 1))
    # Under the exponent of 2^23 it is that many more than 2^23, in float32.
    biased = (code | 0x4B000000).to(tl.float32, bitcast=True)
    return biased - (2.0**23 + 2.0 ** (BITS - 1)), left >> used.to(tl.uint32)


@triton.jit
def _float(values, number, byte, j: tl.constexpr):
    """The bfloat16 weight of bit j of mask bytes, whose first value is `number`."""
    on = (byte >> j) & 1
    return tl.load(values + number, mask=on != 0, other=0).to(tl.float32), number + on


@triton.jit
def _eight(values, byte, number, BITS: tl.constexpr):
    """The eight weights of the lowest bits of a mask, after `number` values."""
    if BITS == 16:
        h0, at = _float(values, number, byte, 0)
        h1, at = _float(values, at, byte, 1)
        h2, at = _float(values, at, byte, 2)
        h3, at = _float(values, at, byte, 3)
        h4, at = _float(values, at, byte, 4)
        h5, at = _float(values, at, byte, 5)
        h6, at = _float(values, at, byte, 6)
        h7, at = _float(values, at, byte, 7)
    else:
        left = _next(values, number, BITS)
        h0, left = _taken(left, byte, 0, BITS)
        h1, left = _taken(left, byte, 1, BITS)
        h2, left = _taken(left, byte, 2, BITS)
        h3, left = _taken(left, byte, 3, BITS)
        if BITS == 8:  # four fill a word
            four = (byte & 1) + ((byte >> 1) & 1) + ((byte >> 2) & 1) + ((byte >> 3) & 1)
            left = _next(values, number + four, BITS)
        h4, left = _taken(left, byte, 4, BITS)
        h5, left = _taken(left, byte, 5, BITS)
        h6, left = _taken(left, byte, 6, BITS)
        h7, left = _taken(left, byte, 7, BITS)
    return h0, h1, h2, h3, h4, h5, h6, h7


@triton.jit
def _four(a, b, c, d, KIND: tl.constexpr):
    """Four tensors [n, m] as one [n, m, 2, 2], in order."""
    return tl.join(tl.join(a.to(KIND), c.to(KIND)), tl.join(b.to(KIND), d.to(KIND)))


@triton.jit
def tile_bits(values, word, number, BITS: tl.constexpr, KIND: tl.constexpr):
    """The dense weight [n, m, 2, 2, 2, 2, 2] of mask words [n, m] after `number` values.

    `values` is a pointer for each row [n, 1].
    """
    # How many bits are set in each byte, then in it and those below.
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    counts = ((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101
    count = (counts >> 24) & 255
    at = number + tl.cumsum(count, 1) - count
    a0, a1, a2, a3, a4, a5, a6, a7 = _eight(values, word, at, BITS)
    b0, b1, b2, b3, b4, b5, b6, b7 = _eight(values, word >> 8, at + (counts & 255), BITS)
    c0, c1, c2, c3, c4, c5, c6, c7 = _eight(values, word >> 16, at + ((counts >> 8) & 255), BITS)
    d0, d1, d2, d3, d4, d5, d6, d7 = _eight(values, word >> 24, at + ((counts >> 16) & 255), BITS)
    return joined(
        *(_four(a0, b0, c0, d0, KIND), _four(a1, b1, c1, d1, KIND), _four(a2, b2, c2, d2, KIND)),
        *(_four(a3, b3, c3, d3, KIND), _four(a4, b4, c4, d4, KIND), _four(a5, b5, c5, d5, KIND)),
        *(_four(a6, b6, c6, d6, KIND), _four(a7, b7, c7, d7, KIND)),
    )


@triton.jit
def product_kernel(
    x, values, mask, rows, blocks, scale, bias, y, M, N, K, steps, scale_row,
    z, R, R_scale, rank, z_row, R_scale_row, N1, N2, N3,
    GROUP: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr, PRMT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr,
    LOW: tl.constexpr, R_GROUP: tl.constexpr, R_BK: tl.constexpr,
):  # fmt: skip
    """As `portable_int4.product_kernel`."""
    n, m, row, turns, first, last = share(N, K, steps, BM, BN, BK)
    width = tl.cdiv(K, 128) * 4
    begin, before = row_start(values, rows, row, BITS)
    word = mask + row[:, None] * width + (first * (BK // 32) + tl.arange(0, BK // 32))[None, :]
    block = blocks + row * (width * 32 // BK) + first
    k = first * BK + tl.arange(0, BK)
    here = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for i in range(first, last):
        xt = tl.load(here, mask=(k < K)[:, None], other=0)
        s = tl.load(scale + row * scale_row + i * BK // GROUP) if GROUP > 0 else 1.0
        number = (before + tl.load(block))[:, None]
        tile = tile_bits(begin[:, None], tl.load(word), number, BITS, HALF)
        acc = add_product(tile.reshape(BN, BK), xt, s, acc, GROUP)
        word += BK // 32
        block += 1
        here += BK
        k += BK
    complete(
        acc, n, m, row, scale, bias, y, M, N, turns, steps, scale_row,
        z, R, R_scale, rank, z_row, R_scale_row, N1, N2, N3,
        GROUP, HALF, BIAS, PRMT, BN, LOW, R_GROUP, R_BK,
    )  # fmt: skip
