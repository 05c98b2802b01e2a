"""A product with a 2:4-sparse weight of four bits, on any GPU that Triton knows.

    y = x W^T + bias, 16 to a few hundred rows of x at a time

The stored bytes are read as they are, sixteen inputs of a row at once: a word of four bytes with
the two codes of each group of four, and sixteen bits with their positions. They become a tile of
the dense weight in registers, which the tensor cores multiply. On NVIDIA each register of two
values is one byte permutation of (both codes, 128, 0), picked by the positions; elsewhere codes are
shifted to their places among four.
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
    check_group,
    check_sizes,
    product,
    share,
)
from slimfx.runtime.kernels.portable_int4 import complete, joined, pair, slot
from slimfx.runtime.pack import Packed24
from torch import Tensor

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")


@dataclass(frozen=True)
class Words24:
    """A weight [N, K] as the kernel reads it: K padded with zero codes to a multiple of 128.

    `words` int32 and `places` int16 [N, K / 16] are the bytes of `Packed24`: views, where its K
    needs no padding. `scale` is as stored.
    """

    words: Tensor
    places: Tensor
    scale: Tensor
    K: int
    group: int


def words_24(packed: Packed24, K: int) -> Words24:
    """The kernel's view of a stored weight [N, K]; `packed_24` is the way back.

    Raises:
        SlimError: the codes have other than four bits, the groups no kernel, or positions do not
            ascend, which this library never stores.
    """
    if packed.bits != 4 or packed.scale is None:
        raise SlimError(
            f"portable_24 takes codes of 4 bits, not {packed.bits}; use expand.prefill for these"
        )
    check_group("portable_24", packed.scale, packed.group)
    groups, sizes = K // 4, {packed.values: K // 4, packed.indices: -(-K // 8)}
    check_sizes("portable_24", sizes, packed.scale, packed.group, K)
    places = packed.indices
    if groups % 2:  # the last byte's high half holds no group: give it positions that ascend
        places = torch.cat([places[:, :-1], places[:, -1:] | 0x40], 1)
    low, high = places & 15, places >> 4
    if not ((low & 3) < (low >> 2)).all() or not ((high & 3) < (high >> 2)).all():
        raise SlimError("portable_24: positions of a group of four do not ascend; pack it again")
    short = -K % BLOCK
    if short or groups % 2:
        values = torch.nn.functional.pad(packed.values, (0, short // 4), value=0x88)
        places = torch.nn.functional.pad(places, (0, short // 8), value=0x44)
    else:
        values = packed.values
    return Words24(
        as_words(values, torch.int32),
        as_words(places, torch.int16),
        *(packed.scale, K, packed.group),
    )


def packed_24(weight: Words24) -> Packed24:
    """The stored weight that `words_24` was given."""
    groups = weight.K // 4
    values = weight.words.view(torch.uint8)[:, :groups]
    indices = weight.places.view(torch.uint8)[:, : -(-groups // 2)]
    if groups % 2:
        indices = torch.cat([indices[:, :-1], indices[:, -1:] & 15], 1)
    scale = weight.scale
    return Packed24(values.contiguous(), indices.contiguous(), scale, 4, weight.group)


def portable_24(
    x: Tensor,
    weight: Words24,
    bias: Tensor | None = None,
    *,
    how: How | None = None,
    low: Low | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] W^T [+ z R^T] + bias in the dtype of x, 16 or 32 bits wide."""
    tensors = (weight.words, weight.places)
    N = weight.words.shape[0]
    operand = Operand(tensors, weight.scale, N, weight.K, weight.group, {})
    return product(product_kernel, x, operand, bias, how, low)


def _table(place: int) -> tuple[int, int]:
    """Eight bytes: for what `_asm` makes of two positions, the two selectors of `prmt` that give
    one of four places its value: 5 the constant's high byte, 0 or 1 a code, 4 the code of zero.
    """
    selectors = [0x54] * 8
    for first in range(4):
        for second in range(first + 1, 4):
            both = first | second << 2
            code = 0 if first == place else 1 if second == place else 4
            selectors[(both ^ both >> 1) & 7] = 0x50 | code
    low, high = (bytes(half) for half in (selectors[:4], selectors[4:]))
    return int.from_bytes(low, "little"), int.from_bytes(high, "little")


def _asm(kind: str, constant: int, one: int, back: int) -> str:
    """PTX from a word and its places to the sixteen values, two in a register.

    Six pairs of positions p ascend, and p ^ (p >> 1) differs in its low three bits for each: an
    index into the tables. A code under the high byte of 128 (bfloat16; 1024 in float16) is that
    number + code + 8, of which `back` is taken away again.
    """
    lines = [
        "{ .reg .b32 C, one, back, F, S, p, t, u, A<4>, s<4>, c<4>, o<8>;",
        f"mov.b32 C, {constant}; mov.b32 one, {one}; mov.b32 back, {back};",
        "and.b32 F, $8, 0x0f0f0f0f; shr.u32 S, $8, 4; and.b32 S, S, 0x0f0f0f0f;",
        "prmt.b32 A0, F, S, 0x5140; prmt.b32 A2, F, S, 0x7362;",
        "shr.u32 A1, A0, 16; shr.u32 A3, A2, 16;",
        "shr.u32 p, $9, 1; xor.b32 p, p, $9; and.b32 p, p, 0x7777;",
    ]
    for place in range(4):
        low, high = _table(place)
        lines.append(f"mov.b32 t, {low}; mov.b32 u, {high}; prmt.b32 s{place}, t, u, p;")
    for i, order in enumerate(("0x5140", "0x7362")):
        lines += [f"prmt.b32 c{i}, s0, s1, {order}; prmt.b32 c{2 + i}, s2, s3, {order};"]
    for group in range(4):
        for half in (0, 1):
            select = f"c{2 * half + group // 2}"
            if group % 2:
                lines.append(f"shr.u32 t, {select}, 16;")
                select = "t"
            lines.append(f"prmt.b32 o{2 * group + half}, A{group}, C, {select};")
    lines += [f"fma.rn.{kind}x2 o{i}, o{i}, one, back;" for i in range(8)]
    lines += [f"mov.b32 ${i}, o{i};" for i in range(8)]
    return "\n".join(lines) + " }"


_BF16 = tl.constexpr(_asm("bf16", 0x43084308, 0x3F803F80, 0xC308C308))
_FP16 = tl.constexpr(_asm("f16", 0x64086408, 0x3C003C00, 0xE408E408))
_REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 2))
_INTS = tl.constexpr((tl.int32,) * 8)


@triton.jit
def _four(word, place, g: tl.constexpr):
    """Group g of a word: its two codes at their places among four, the others zero."""
    both = place >> (4 * g)
    codes = (word >> (8 * g)) ^ 0x88
    first = (codes & 15) << ((both & 3) << 2)
    return first | (((codes >> 4) & 15) << (both & 12))


@triton.jit
def tile_24(word, place, HALF: tl.constexpr, PRMT: tl.constexpr):
    """The dense codes [n, 16 m] of words and places [n, m]."""
    if PRMT:
        if HALF == tl.bfloat16:
            o = tl.inline_asm_elementwise(_BF16, _REGISTERS, [word, place], _INTS.value, True, 1)
        else:
            o = tl.inline_asm_elementwise(_FP16, _REGISTERS, [word, place], _INTS.value, True, 1)
        h0, h1 = pair(o[0], HALF)
        h2, h3 = pair(o[1], HALF)
        h4, h5 = pair(o[2], HALF)
        h6, h7 = pair(o[3], HALF)
        l0, l1 = pair(o[4], HALF)
        l2, l3 = pair(o[5], HALF)
        l4, l5 = pair(o[6], HALF)
        l6, l7 = pair(o[7], HALF)
        a = joined(h0, h2, h4, h6, l0, l2, l4, l6)
        b = joined(h1, h3, h5, h7, l1, l3, l5, l7)
        return tl.join(a, b).reshape(word.shape[0], 16 * word.shape[1])
    else:
        f0, f1 = _four(word, place, 0), _four(word, place, 1)
        f2, f3 = _four(word, place, 2), _four(word, place, 3)
        a = joined(
            *(slot(f0, 0, HALF), slot(f0, 2, HALF), slot(f1, 0, HALF), slot(f1, 2, HALF)),
            *(slot(f2, 0, HALF), slot(f2, 2, HALF), slot(f3, 0, HALF), slot(f3, 2, HALF)),
        )
        b = joined(
            *(slot(f0, 1, HALF), slot(f0, 3, HALF), slot(f1, 1, HALF), slot(f1, 3, HALF)),
            *(slot(f2, 1, HALF), slot(f2, 3, HALF), slot(f3, 1, HALF), slot(f3, 3, HALF)),
        )
        return tl.join(a, b).reshape(word.shape[0], 16 * word.shape[1])


@triton.jit
def product_kernel(
    x, words, places, scale, bias, y, M, N, K, steps, scale_row,
    z, R, R_scale, rank, z_row, R_scale_row, N1, N2, N3,
    GROUP: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr, PRMT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    LOW: tl.constexpr, R_GROUP: tl.constexpr, R_BK: tl.constexpr,
):  # fmt: skip
    """As `portable_int4.product_kernel`."""
    n, m, row, turns, first, last = share(N, K, steps, BM, BN, BK)
    # As a multiple of eight, so that the compiler knows that sixteen bytes can be read at once.
    at = (
        row[:, None] * (tl.cdiv(K, 128) * 8)
        + (first * (BK // 16) + tl.arange(0, BK // 16))[None, :]
    )
    k = first * BK + tl.arange(0, BK)
    here = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    word = tl.load(words + at, mask=first < last, other=0)
    place = tl.load(places + at, mask=first < last, other=0)
    for i in range(first, last):
        xt = tl.load(here, mask=(k < K)[:, None], other=0)
        s = tl.load(scale + row * scale_row + i * BK // GROUP) if GROUP > 0 else 1.0
        at += BK // 16
        here += BK
        k += BK
        # The next turn's weights are on their way while these are multiplied.
        next_word = tl.load(words + at, mask=i + 1 < last, other=0)
        next_place = tl.load(places + at, mask=i + 1 < last, other=0)
        tile = tile_24(word, place.to(tl.int32), HALF, PRMT)
        acc = add_product(tile, xt, s, acc, GROUP)
        word = next_word
        place = next_place
    complete(
        acc, n, m, row, scale, bias, y, M, N, turns, steps, scale_row,
        z, R, R_scale, rank, z_row, R_scale_row, N1, N2, N3,
        GROUP, HALF, BIAS, PRMT, BN, LOW, R_GROUP, R_BK,
    )  # fmt: skip
