"""A product with a dense weight of four-bit codes, on any GPU that Triton knows.

    y = x W^T + bias, 16 to a few hundred rows of x at a time

The stored bytes are read as they are, eight codes of a row at once, and become a tile of the weight
in registers, which the tensor cores multiply. On NVIDIA a byte permutation puts codes, two to a
register, under the high byte of 128; elsewhere they are shifted. Sums are float32; those of parts
of K are added in order. The other portable products share what is here: launch, x, sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from slimfx.runtime.pack import PackedDense
from torch import Tensor

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")

BLOCK = 128
"""Inputs of a row that a kernel takes in a turn, unless groups are shorter."""
_HALF = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class How:
    """How to launch a product.

    Args:
        split: parts of K that run side by side; None for as many as keep the GPU busy.
        prmt: permute bytes by PTX; None to do so on NVIDIA.
    """

    split: int | None = None
    prmt: bool | None = None


@dataclass(frozen=True)
class Operand:
    """A weight [N, K] as `product` launches a kernel on it; `constants` are the kernel's own."""

    tensors: tuple[Tensor, ...]
    scale: Tensor
    N: int
    K: int
    group: int
    constants: Mapping[str, Any]


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


def as_words(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as integers, copied unless they begin where sixteen of them may be read at once."""
    stored = stored.contiguous()
    apart = stored.data_ptr() % 16 or stored.storage_offset() % dtype.itemsize
    return (stored.clone() if apart else stored).view(dtype)


def packed_4(weight: Words4) -> PackedDense:
    """The stored weight that `words_4` was given."""
    codes = weight.words.view(torch.uint8)[:, : -(-weight.K // 2)]
    return PackedDense(codes.contiguous(), weight.scale, 4, weight.group)


def portable_int4(
    x: Tensor, weight: Words4, bias: Tensor | None = None, *, how: How | None = None
) -> Tensor:
    """y [..., N] = x [..., K] W^T + bias, in the dtype of x; bfloat16, float16 or float32."""
    N = weight.words.shape[0]
    operand = Operand((weight.words,), weight.scale, N, weight.K, weight.group, {})
    return product(_product, x, operand, bias, how)


def product(
    kernel: Any, x: Tensor, weight: Operand, bias: Tensor | None, how: How | None
) -> Tensor:
    """x W^T + bias by a kernel with the arguments of `_product`.

    Raises:
        SlimError: x has another width or a dtype that no kernel multiplies.
    """
    how, N, K, scale = how or How(), weight.N, weight.K, weight.scale
    if x.dtype not in (*_HALF, torch.float32) or x.shape[-1] != K:
        raise SlimError(
            f"portable product: x is {x.dtype} {tuple(x.shape)}, the weight takes bfloat16, "
            f"float16 or float32 [..., {K}]; convert x first"
        )
    y = x.new_empty(*x.shape[:-1], N)
    if not y.numel():
        return y
    rows = _three_halves(x) if x.dtype is torch.float32 else x.reshape(-1, K).contiguous()
    M, BK = rows.shape[0], block_of(scale, weight.group)
    BM, BN = 16 if M <= 16 else 32 if M <= 32 else 64, 64
    grid = (triton.cdiv(N, BN), triton.cdiv(M, BM))
    blocks = triton.cdiv(K, BK)
    split = how.split or _split(x.device, grid, blocks)
    whole = split == 1 and M * N == y.numel()
    out = y if whole else x.new_empty(split, M, N, dtype=torch.float32)
    kernel[(grid[0], split, grid[1])](
        *(rows, *weight.tensors, scale, scale if bias is None else bias, out),
        *(M, N, K, triton.cdiv(blocks, split), scale.shape[1] if scale.shape[0] > 1 else 0),
        GROUP=weight.group if scale.shape[1] > 1 else 0,
        HALF=_HALF[rows.dtype],
        BIAS=whole and bias is not None,
        PRMT=x.is_cuda and torch.version.hip is None if how.prmt is None else how.prmt,
        **{"BM": BM, "BN": BN, "BK": BK, **weight.constants},
        **{"num_warps": BN // 16, "num_stages": 1},
    )
    if not whole:
        add_parts(out, bias, y)
    return y


def block_of(scale: Tensor, group: int) -> int:
    """Inputs that a kernel takes in a turn: 128, or what divides that and the groups."""
    grouped = scale.shape[1] > 1 and group % 16 == 0
    return math.gcd(group, BLOCK) if grouped else BLOCK


def _three_halves(x: Tensor) -> Tensor:
    """float32 x [M, K] as three bfloat16 [3 M, K] whose sum it is: codes are exact in bfloat16."""
    rows = x.reshape(-1, x.shape[-1])
    high = rows.bfloat16()
    rest = rows - high
    middle = rest.bfloat16()
    return torch.cat([(rest - middle).bfloat16(), middle, high])


def _split(device: torch.device, grid: tuple[int, int], steps: int) -> int:
    """Parts of K, of four turns at least, so that there are two programs a multiprocessor: one
    computes while another waits for memory.
    """
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // (grid[0] * grid[1]), steps // 4))


def add_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [..., N] becomes the sum of float32 parts, each of its size, in order, and of the bias."""
    width = 1024
    _add_parts[(triton.cdiv(y.numel(), width),)](
        *(parts, parts if bias is None else bias, y, y.numel(), y.shape[-1]),
        PARTS=parts.numel() // y.numel(),
        BIAS=bias is not None,
        BLOCK=width,
    )


def check_sizes(
    kernel: str, arrays: Mapping[Tensor, int], scale: Tensor | None, group: int, K: int
) -> None:
    """Refuse arrays of other widths, and scales of other shapes, than a weight [N, K] has: what a
    kernel reads past their ends is anything.
    """
    N = next(iter(arrays)).shape[0]
    for stored, width in arrays.items():
        if tuple(stored.shape) != (N, width):
            raise SlimError(
                f"{kernel}: {tuple(stored.shape)} for a weight [{N}, {K}], not [{N}, {width}]; "
                f"pack it again"
            )
    if scale is None:
        return
    groups = -(-K // group)
    if scale.dim() != 2 or scale.shape[0] not in (1, N) or scale.shape[1] not in (1, groups):
        raise SlimError(
            f"{kernel}: scale {tuple(scale.shape)} for a weight [{N}, {K}] in groups of {group}; "
            f"pack it again"
        )


def check_group(kernel: str, scale: Tensor, group: int, unit: int = 16) -> None:
    """Refuse groups that end within what the kernel multiplies at once."""
    if scale.shape[1] > 1 and group % unit:
        raise SlimError(
            f"{kernel}: groups of {group} inputs, not a multiple of {unit}; use expand.prefill for "
            f"these"
        )


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
def add_product(tile, x, scale, acc, GROUP: tl.constexpr):
    """acc [n, m] + tile [n, k] x [k, m], times the scale of the tile's groups if it has them."""
    if GROUP > 0:
        return acc + tl.dot(tile, x) * scale.to(tl.float32)[:, None]
    else:
        return tl.dot(tile, x, acc)


@triton.jit
def put(acc, n, m, scale, bias, y, M, N, scale_row, GROUP: tl.constexpr, BIAS: tl.constexpr):
    """Store acc [n, m] as y [split, M, N], times the scale of a row if it has only one."""
    if GROUP == 0:
        step = tl.load(scale + tl.minimum(n, N - 1).to(tl.int64) * scale_row)
        acc *= step.to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    part = tl.program_id(1).to(tl.int64) * M
    at = y + (part + m)[None, :] * N + n[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _product(
    x,
    words,
    scale,
    bias,
    y,
    M,
    N,
    K,
    steps,
    scale_row,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BIAS: tl.constexpr,
    PRMT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1).to(tl.int64)  # what lies past the last row is not stored
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BK))
    # As a multiple of sixteen, so that the compiler knows that sixteen bytes can be read at once.
    at = (
        row[:, None] * (tl.cdiv(K, 128) * 16) + (first * (BK // 8) + tl.arange(0, BK // 8))[None, :]
    )
    k = first * BK + tl.arange(0, BK)
    here = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    word = tl.load(words + at, mask=first < last, other=0)
    for i in range(first, last):
        xt = tl.load(here, mask=(k < K)[:, None], other=0)
        s = tl.load(scale + row * scale_row + i * BK // GROUP) if GROUP > 0 else 1.0
        at += BK // 8
        here += BK
        k += BK
        # The next turn's weights are on their way while these are multiplied.
        next_word = tl.load(words + at, mask=i + 1 < last, other=0)
        tile = tile_4(word, HALF, PRMT)
        acc = add_product(tile, xt, s, acc, GROUP)
        word = next_word
    put(acc, n, m, scale, bias, y, M, N, scale_row, GROUP, BIAS)


@triton.jit
def _add_parts(
    parts, bias, y, count, N, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(PARTS):
        total += tl.load(parts + tl.cast(i, tl.int64) * count + at, mask=at < count, other=0)
    if BIAS:
        total += tl.load(bias + at % N, mask=at < count, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < count)
