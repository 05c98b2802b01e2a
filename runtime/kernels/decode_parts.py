"""Linears that share up to 16 rows of x, with adapters of four bits: two launches for all of them.

    y = [x W_1^T + (x L_1^T) R_1^T, x W_2^T + (x L_2^T) R_2^T, ...]

The rows of W_1, W_2, ... and of L_1, L_2, ... are tiles of the first launch. R_1, R_2, ... follow
each other by rows as well, and in the second launch each tile takes the part of x L^T that is its
own. Every sum is taken in one order, so that two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from slimfx.runtime.fragments import ROWS, Fragments
from slimfx.runtime.kernels.decode_24 import decode_24_kernel
from slimfx.runtime.kernels.decode_int4 import launch_int4
from slimfx.runtime.kernels.launch import check, check_device, check_layout, pairs
from slimfx.runtime.kernels.mma import Split, constants, split_for
from slimfx.runtime.kernels.warp import accumulate, finish
from torch import Tensor

from slimfx.errors import need

triton: Any = need("triton")
tl: Any = need("triton.language")

PARTS = 4
"""Linears at most."""
_NEVER = 2**31 - 1


@triton.jit(do_not_specialize=["M", "N1", "N2", "N3"])
def add_parts_kernel(
    z, XS, M, words, scales, sums, y, N, N1, N2, N3,
    K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, TEXT0: tl.constexpr,
    TEXT1: tl.constexpr, KINDS: tl.constexpr, F: tl.constexpr, RT: tl.constexpr,
    NW: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """y [M, N] = sums [SUMS, M, N] + z R^T; the second part begins at row N1, the third at N2."""
    first = tl.program_id(0) * RT
    row = first * 16
    part = (row >= N1).to(tl.int32) + (row >= N2).to(tl.int32) + (row >= N3).to(tl.int32)
    added = accumulate(
        z + part * (K // 2), XS, M, words, scales, first, (N + 15) // 16, 0,
        False, K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, 1,
    )  # fmt: skip
    finish(added, scales, sums, y, y, M, N, first, GROUP, SUMS, False, F, RT)


def decode_parts(
    x: Tensor, weight: Fragments, L: Fragments, R: Fragments, rows: Sequence[int]
) -> Tensor:
    """y bfloat16 [M, sum(rows)] for x bfloat16 [M, K], M up to 16.

    Args:
        weight: of all parts, 2:4 or dense.
        L: [parts r, K], dense; r is a multiple of 16.
        R: [sum(rows), r], dense.
        rows: of each part, multiples of 16 but the last.
    """
    check("decode_parts", x, weight, weight.where)
    check("decode_parts: L", x, L, "dense")
    check("decode_parts: R", x.new_empty(1, R.K), R, "dense")
    torch._check(
        len(rows) <= PARTS and all(N % ROWS == 0 for N in rows[:-1]) and sum(rows) == R.N,
        lambda: f"decode_parts: rows {list(rows)}, not up to {PARTS} multiples of {ROWS}",
    )
    torch._check(
        weight.N == R.N and L.N == len(rows) * R.K and R.K % ROWS == 0,
        lambda: (
            f"decode_parts: L has {L.N} rows, the weight {weight.N}, R [{R.N}, {R.K}], which does "
            f"not fit {len(rows)} parts"
        ),
    )
    check_device("decode_parts", x.device)
    first = _first_24 if weight.where == "2:4" else _first_int4
    return _second(*first(x, weight, L), R, rows)


def _first_24(x: Tensor, weight: Fragments, L: Fragments) -> tuple[Tensor, Tensor]:
    """x W^T as float32 [P, M, N], and x L^T, in one launch."""
    M, N = x.shape[0], weight.N
    split = split_for(N, weight.K, two=M > 8)
    y = torch.empty(split.programs, M, N, dtype=torch.float32, device=x.device)
    z = torch.empty(M, L.N, dtype=torch.bfloat16, device=x.device)
    own, of_L = constants(weight, M), constants(L, M)
    programs = -(-N // (ROWS * split.tiles)) * split.programs + -(-L.N // (ROWS * split.tiles))
    words = pairs(x)
    compiled = decode_24_kernel[(programs,)](
        words, words.stride(0), M, weight.data, weight.scale.view(torch.int32), y, y, N,
        L.data, L.scale.view(torch.int32), z, L.N,
        **own, RT=split.tiles, NW=split.warps, SK=split.programs, BIAS=False, LOW=True,
        L_GROUP=of_L["GROUP"], L_PART=of_L["PART"], L_TEXT=of_L["TEXT0"], L_KINDS=of_L["KINDS"],
        num_warps=split.warps,
    )  # fmt: skip
    check_layout("decode_parts", compiled, split.warps)
    return y, z


def _first_int4(x: Tensor, weight: Fragments, L: Fragments) -> tuple[Tensor, Tensor]:
    """The same for a dense weight, which takes a launch for each."""
    words, two = pairs(x), x.shape[0] > 8
    y = launch_int4(words, weight, split_for(weight.N, weight.K, two=two))
    return y[None], launch_int4(words, L, split_for(L.N, L.K, two=two))


def _second(sums: Tensor, z: Tensor, R: Fragments, rows: Sequence[int]) -> Tensor:
    """The sums with what R makes of z added."""
    M, N = z.shape[0], R.N
    split = split_for(N, R.K, two=M > 8, alone=False)
    if any(n % (ROWS * split.tiles) for n in rows[:-1]):  # a program's tiles are of one part
        split = Split(1, split.warps)
    ends = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
    ends += [_NEVER] * (PARTS - 1 - len(ends))
    y, words = torch.empty(M, N, dtype=torch.bfloat16, device=z.device), pairs(z)
    compiled = add_parts_kernel[(-(-N // (ROWS * split.tiles)),)](
        words, words.stride(0), M, R.data, R.scale.view(torch.int32), sums, y, N, *ends,
        **constants(R, M), RT=split.tiles, NW=split.warps, SUMS=sums.shape[0],
        num_warps=split.warps,
    )  # fmt: skip
    check_layout("decode_parts", compiled, split.warps)
    return y
