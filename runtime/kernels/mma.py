"""Assembly that multiplies four words of codes by x on tensor cores, as `fragments` lays them out.

    c += (codes - 8) x^T    four products, A the weight of 16 rows, B eight rows of x

A word becomes the four A registers without a table: 0x4300 | u is the bfloat16 128 + u, from which
136 is taken. Operands are tensors of four registers a thread, and so are results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd

from slimfx.runtime.fragments import BLOCK, Fragments

_SPARSE = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32"
_DENSE = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
_ONE, _LESS = "0x3F803F80", "0xC308C308"
"""1 and -136, twice. A fused multiply-add: plain addition of bf16x2 is there from sm_90 only."""


@dataclass(frozen=True)
class Assembly:
    """Text and constraints of `tl.inline_asm_elementwise` with pack 4."""

    text: str
    constraints: str


@cache
def four_products(where: str, *, half: int = 0, two: bool = False, parts: int = 1) -> Assembly:
    """The assembly; results are `parts`, for each the first eight rows of x and, if `two`, more.

    Operands: what is added to, if it is one part; the words; if 2:4, where values stay; x, each
    tensor 32 inputs of eight rows, the first eight rows of all inputs and then the others.

    Args:
        where: "2:4" or "dense".
        half: which half of a 2:4 block's metadata.
        two: 9 to 16 rows of x, not up to 8.
        parts: the products are split into so many sums.
    """
    fragments = 2 if two else 1
    results = parts * fragments
    steps = 4 if where == "2:4" else 2  # tensors of x for eight rows
    first = 4 * results
    q = first + (4 * results if parts == 1 else 0)
    meta = q + 4
    x = meta + (4 if where == "2:4" else 0)
    sums = [f"c{i}_{j}" for i in range(results) for j in range(4)]
    begin = [f"${first + i}" for i in range(4 * results)] if parts == 1 else ["0f00000000"] * 16
    lines = [
        "{",
        f".reg .b32 t, one, less, a0, a1, a2, a3; .reg .f32 {', '.join(sums)};",
        f"mov.b32 one, {_ONE}; mov.b32 less, {_LESS};",
        *(f"mov.f32 {name}, {begin[i % len(begin)]};" for i, name in enumerate(sums)),
    ]
    for i in range(4):
        lines += _registers(f"${q + i}")
        for n in range(fragments):
            c = ", ".join(f"c{(i * parts // 4) * fragments + n}_{j}" for j in range(4))
            if where == "2:4":
                word = meta + 2 * half + i // 2
                b = ", ".join(f"${x + 4 * (n * steps + i) + j}" for j in range(4))
                lines.append(f"{_SPARSE} {{{c}}}, {{a0, a1, a2, a3}}, {{{b}}}, {{{c}}},")
                lines[-1] += f" ${word}, 0x{i % 2};"
            else:
                b = ", ".join(f"${x + 4 * (n * steps + i // 2) + 2 * (i % 2) + j}" for j in (0, 1))
                lines.append(f"{_DENSE} {{{c}}}, {{a0, a1, a2, a3}}, {{{b}}}, {{{c}}};")
    lines += [f"mov.f32 ${i}, {name};" for i, name in enumerate(sums)]
    floats = results if parts == 1 else 0
    words = x - q + 4 * fragments * steps
    kinds = ["=f"] * 4 * results + ["f"] * 4 * floats + ["r"] * words
    return Assembly("\n".join([*lines, "}"]), ",".join(kinds))


def _registers(word: str) -> list[str]:
    """Registers a0 to a3 of a word of codes."""
    lines = []
    for j in range(4):
        if j:
            lines.append(f"shr.u32 t, {word}, {4 * j};")
        source = "t" if j else word
        lines.append(f"lop3.b32 a{j}, {source}, 0x000f000f, 0x43004300, 0xEA;")
        lines.append(f"fma.rn.bf16x2 a{j}, a{j}, one, less;")
    return lines


@dataclass(frozen=True)
class Split:
    """How programs share a matrix: tiles of 16 rows a warp, warps along K, turns read ahead, and
    warps along N.
    """

    tiles: int
    warps: int
    ahead: int = 2
    across: int = 1


_MANY = 1056
"""Tiles of which a warp takes two: eight for each multiprocessor of an H100 or H200. The same for
all GPUs, so that all give the same bits."""


def split_for(N: int, K: int, M: int) -> Split:
    """A `Split` for a matrix [N, K] and M rows of x: of those that an H200 was fastest or nearly so
    with for the layers of Llama 2 7B, one whose programs all run at once up to eight rows.
    """
    tiles = -(-N // 16)
    two = tiles >= (_MANY if M <= 8 else _MANY // 2)  # they share what is read of x
    several = tiles >= _MANY // 2
    warps, turns = 2 if two or (several and 1 < M <= 8) else 4, -(-K // 256)
    while warps > turns:
        warps //= 2
    return Split(2 if two else 1, warps, 1 if M > 8 else 2 if several else 3)


def split_for_low(K: int, M: int) -> Split:
    """A `Split` for L of all linears: it has few rows, and is wanted at once."""
    warps, turns = 4 if 8 < M <= 16 else 8, -(-K // 256)
    while warps > turns:
        warps //= 2
    return Split(1, warps, 2 if M <= 16 else 1)


def fragments_of(rows: int) -> int:
    """Of eight rows of x, as programs take them: a power of two."""
    return 1 << (max(1, -(-rows // 8)) - 1).bit_length()


def constants(matrix: Fragments, rows: int) -> dict[str, int | str]:
    """The constants of `warp.stream` that depend on a matrix and on how many rows x has."""
    two = rows > 8
    width = 256 if matrix.group >= matrix.K else gcd(matrix.group, 256)
    parts = max(1, BLOCK[matrix.where] // (2 if matrix.where == "2:4" else 1) // width)
    halves = [
        four_products(matrix.where, half=half, two=two, parts=parts)
        for half in (0, 1 if matrix.where == "2:4" else 0)
    ]
    return {
        "K": matrix.K,
        "GROUP": 0 if matrix.group >= matrix.K else matrix.group,
        "PART": width,
        "TEXT0": halves[0].text,
        "TEXT1": halves[1].text,
        "KINDS": halves[0].constraints,
        "F": fragments_of(rows),
    }
