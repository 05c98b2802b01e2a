"""A product with a dense weight of four-bit codes, on any GPU that Triton knows.

    y = x W^T + bias, 16 to a few hundred rows of x at a time

The stored bytes are read as they are, eight codes of a row at once, and become a tile of the weight
in registers, which the tensor cores multiply. On NVIDIA a byte permutation puts codes, two to a
register, under the high byte of 128; elsewhere they are shifted. Adapters are such weights, too:
the other portable products take what they add from here.
"""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

from collections.abc import Sequence
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
    put,
    scaled,
    share,
)
from slimfx.runtime.pack import PackedDense
from torch import Tensor

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")


@dataclass(frozen=True)
class Words4:
    """A weight [N, K] as the kernel reads it: K padded with zero codes to a multiple of 128.

    `words` int32 [N, K / 8] are the bytes of `PackedDense`: a view, where its K needs no padding.
    """

    words: Tensor
    scale: Tensor
    K: int
    group: int


def words_4(packed: PackedDense, K: int) -> Words4:
    """The kernel's view of a stored weight [N, K]; `packed_4` is the way back.

    Raises:
        SlimError: the codes have other than four bits, or the groups no kernel.
    """
    if packed.bits != 4:
        raise SlimError(
            f"portable_int4 takes codes of 4 bits, not {packed.bits}; use expand.prefill for these"
        )
    check_group("portable_int4", packed.scale, packed.group)
    codes = packed.codes
    check_sizes("portable_int4", {codes: -(-K // 2)}, packed.scale, packed.group, K)
    if K % BLOCK:
        codes = torch.nn.functional.pad(codes, (0, -K % BLOCK // 2), value=0x88)
    return Words4(as_words(codes, torch.int32), packed.scale, K, packed.group)


def packed_4(weight: Words4) -> PackedDense:
    """The stored weight that `words_4` was given."""
    codes = weight.words.view(torch.uint8)[:, : -(-weight.K // 2)]
    return PackedDense(codes.contiguous(), weight.scale, 4, weight.group)


def portable_int4(
    x: Tensor,
    weight: Words4,
    bias: Tensor | None = None,
    *,
    how: How | None = None,
    low: Low | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] W^T [+ z R^T] + bias in the dtype of x, 16 or 32 bits wide."""
    return product(product_kernel, x, operand(weight), bias, how, low)


def low_of(x: Tensor, L: Words4, R: Words4, rows: Sequence[int]) -> Low:
    """What adapters add to a product with x: a launch for L [linears r, K], of R [N, r] its words.

    Args:
        rows: of each linear, multiples of 16 but the last.
    """
    return Low(portable_int4(x, L), operand(R), rows)


def operand(weight: Words4) -> Operand:
    """A weight as `product` takes it."""
    N = weight.words.shape[0]
    return Operand((weight.words,), weight.scale, N, weight.K, weight.group, {})


def _asm(kind: str, constant: int, one: int, back: int) -> str:
    """PTX from a word to its eight codes, two in a register: each under the high byte of 128
    (bfloat16; 1024 in float16), which makes it that number + code + 8; `back` is taken away again.
    """
    lines = [
        "{ .reg .b32 C, one, back, F, S, A<2>, o<4>;",
        f"mov.b32 C, {constant}; mov.b32 one, {one}; mov.b32 back, {back};",
        "and.b32 F, $4, 0x0f0f0f0f; shr.u32 S, $4, 4; and.b32 S, S, 0x0f0f0f0f;",
        "prmt.b32 A0, F, S, 0x5140; prmt.b32 A1, F, S, 0x7362;",
        "prmt.b32 o0, A0, C, 0x5150; prmt.b32 o1, A0, C, 0x5352;",
        "prmt.b32 o2, A1, C, 0x5150; prmt.b32 o3, A1, C, 0x5352;",
    ]
    lines += [f"fma.rn.{kind}x2 o{i}, o{i}, one, back;" for i in range(4)]
    lines += [f"mov.b32 ${i}, o{i};" for i in range(4)]
    return "\n".join(lines) + " }"


_BF16 = tl.constexpr(_asm("bf16", 0x43434343, 0x3F803F80, 0xC308C308))
_FP16 = tl.constexpr(_asm("f16", 0x64646464, 0x3C003C00, 0xE408E408))
_REGISTERS = tl.constexpr(",".join(["=r"] * 4 + ["r"]))
_INTS = tl.constexpr((tl.int32,) * 4)


@triton.jit
def pair(value, HALF: tl.constexpr):
    """The two 16-bit floats of a register."""
    low = value.to(tl.int16).to(HALF, bitcast=True)
    return low, (value >> 16).to(tl.int16).to(HALF, bitcast=True)


@triton.jit
def slot(four, j: tl.constexpr, HALF: tl.constexpr):
    """One of four signed codes of four bits, as a float."""
    value = ((four << (28 - 4 * j)) >> 28).to(tl.float32)
    if HALF == tl.bfloat16:  # exact: these are small integers
        return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(HALF, bitcast=True)
    else:
        return value.to(HALF)


@triton.jit
def joined(h0, h1, h2, h3, h4, h5, h6, h7):
    """Eight tensors [n, m] as one [n, m, 2, 2, 2], in order."""
    even = tl.join(tl.join(h0, h4), tl.join(h2, h6))
    return tl.join(even, tl.join(tl.join(h1, h5), tl.join(h3, h7)))


@triton.jit
def tile_4(word, HALF: tl.constexpr, PRMT: tl.constexpr):
    """The codes [n, 8 m] of words [n, m]."""
    if PRMT:
        if HALF == tl.bfloat16:
            o = tl.inline_asm_elementwise(_BF16, _REGISTERS, [word], _INTS.value, True, 1)
        else:
            o = tl.inline_asm_elementwise(_FP16, _REGISTERS, [word], _INTS.value, True, 1)
        h0, h1 = pair(o[0], HALF)
        h2, h3 = pair(o[1], HALF)
        h4, h5 = pair(o[2], HALF)
        h6, h7 = pair(o[3], HALF)
    else:
        low = word ^ -2004318072  # 0x88888888: signed codes
        high = low >> 16
        h0, h1 = slot(low, 0, HALF), slot(low, 1, HALF)
        h2, h3 = slot(low, 2, HALF), slot(low, 3, HALF)
        h4, h5 = slot(high, 0, HALF), slot(high, 1, HALF)
        h6, h7 = slot(high, 2, HALF), slot(high, 3, HALF)
    return joined(h0, h1, h2, h3, h4, h5, h6, h7).reshape(word.shape[0], 8 * word.shape[1])


@triton.jit
def sum_4(
    acc, x, words, scale, row, m, first, last, M, K, width, scale_row,
    GROUP: tl.constexpr, HALF: tl.constexpr, PRMT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [n, m] + x W^T of some turns, `width` from a row of x to the next; scaled by groups."""
    # As a multiple of sixteen, so that the compiler knows that sixteen bytes can be read at once.
    at = (
        row[:, None] * (tl.cdiv(K, 128) * 16) + (first * (BK // 8) + tl.arange(0, BK // 8))[None, :]
    )
    k = first * BK + tl.arange(0, BK)
    here = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * width + k[:, None]
    word = tl.load(words + at, mask=first < last, other=0)
    for i in range(first, last):
        xt = tl.load(here, mask=(k < K)[:, None], other=0)
        s = tl.load(scale + row * scale_row + i * BK // GROUP) if GROUP > 0 else 1.0
        at += BK // 8
        here += BK
        k += BK
        # The next turn's weights are on their way while these are multiplied.
        next_word = tl.load(words + at, mask=i + 1 < last, other=0)
        acc = add_product(tile_4(word, HALF, PRMT), xt, s, acc, GROUP)
        word = next_word
    return acc


@triton.jit
def add_low(
    acc, row, m, z, words, scale, M, turns, steps, rank, width, scale_row, N1, N2, N3,
    GROUP: tl.constexpr, HALF: tl.constexpr, PRMT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [n, m] + z R^T, what of its turns is a program's: they follow `turns` of W.

    `width` is from a row of z to the next; the second linear's rows begin at N1, and so on.
    """
    n = tl.program_id(0) * BN
    part = (n >= N1).to(tl.int64) + (n >= N2).to(tl.int64) + (n >= N3).to(tl.int64)
    first = tl.maximum(tl.program_id(1) * steps - turns, 0)
    last = tl.minimum((tl.program_id(1) + 1) * steps - turns, tl.cdiv(rank, BK))
    sums = acc if GROUP > 0 else tl.zeros_like(acc)
    sums = sum_4(
        sums, z + part * rank, words, scale, row, m, first, last, M, rank, width, scale_row,
        GROUP, HALF, PRMT, BK,
    )  # fmt: skip
    return sums if GROUP > 0 else acc + scaled(sums, scale, row, scale_row, GROUP)


@triton.jit
def complete(
    acc, n, m, row, scale, bias, y, M, N, turns, steps, scale_row,
    z, R, R_scale, rank, z_row, R_scale_row, N1, N2, N3,
    GROUP: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr, PRMT: tl.constexpr,
    BN: tl.constexpr, LOW: tl.constexpr, R_GROUP: tl.constexpr, R_BK: tl.constexpr,
):  # fmt: skip
    """Scale the sums [n, m] of W, add turns of R if LOW and the bias if BIAS, and store them."""
    acc = scaled(acc, scale, row, scale_row, GROUP)
    if LOW:
        acc = add_low(
            acc, row, m, z, R, R_scale, M, turns, steps, rank, z_row, R_scale_row, N1, N2, N3,
            R_GROUP, HALF, PRMT, BN, R_BK,
        )  # fmt: skip
    put(acc, n, m, bias, y, M, N, BIAS)


@triton.jit
def product_kernel(
    x, words, scale, bias, y, M, N, K, steps, scale_row,
    z, R, R_scale, rank, z_row, R_scale_row, N1, N2, N3,
    GROUP: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr, PRMT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    LOW: tl.constexpr, R_GROUP: tl.constexpr, R_BK: tl.constexpr,
):  # fmt: skip
    """y [split, M, N] of `steps` turns: those of W, then of R if LOW, and the bias if BIAS."""
    n, m, row, turns, first, last = share(N, K, steps, BM, BN, BK)
    acc = tl.zeros((BN, BM), tl.float32)
    acc = sum_4(
        acc, x, words, scale, row, m, first, last, M, K, K, scale_row, GROUP, HALF, PRMT, BK
    )
    complete(
        acc, n, m, row, scale, bias, y, M, N, turns, steps, scale_row,
        z, R, R_scale, rank, z_row, R_scale_row, N1, N2, N3,
        GROUP, HALF, BIAS, PRMT, BN, LOW, R_GROUP, R_BK,
    )  # fmt: skip
