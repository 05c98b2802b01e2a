"""Linears that share up to 64 rows of x, with adapters of four bits: two launches for all of them.

    y = [x W_1^T + (x L_1^T) R_1^T, x W_2^T + (x L_2^T) R_2^T, ...]

The rows of W_1, W_2, ... and of L_1, L_2, ... are tiles of the first launch. R_1, R_2, ... follow
each other by rows as well, and in the second launch each tile takes the part of x L^T that is its
own. Every sum is taken in one order, so that two runs give the same bits.
"""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

from collections.abc import Sequence

import torch
from slimfx.runtime.fragments import ROWS, Fragments
from slimfx.runtime.kernels.decode import launch_decode
from slimfx.runtime.kernels.launch import check, check_device, check_layout, check_weight, early
from slimfx.runtime.kernels.mma import Split, constants, split_for
from slimfx.runtime.kernels.warp import accumulate, finish
from torch import Tensor

from slimfx.errors import need

triton = need("triton")
tl = need("triton.language")

PARTS = 4
"""Linears at most."""
_NEVER = 2**31 - 1


@triton.jit(do_not_specialize=["M", "N1", "N2", "N3"])
def add_parts_kernel(
    z, M, words, scales, sums, y, N, N1, N2, N3,
    K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, TEXT0: tl.constexpr,
    TEXT1: tl.constexpr, KINDS: tl.constexpr, F: tl.constexpr, NATURAL: tl.constexpr,
    RT: tl.constexpr, NW: tl.constexpr, SUMS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y [M, N] = sums [SUMS, M, N] + z R^T; the second part begins at row N1, the third at N2."""
    first = tl.program_id(0) * RT
    row = first * 16
    part = (row >= N1).to(tl.int32) + (row >= N2).to(tl.int32) + (row >= N3).to(tl.int32)
    added = accumulate(
        z + part * ((K + 31) // 32 * (128 * F)), M, words, scales, first, (N + 15) // 16, 0,
        False, K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, 1, EARLY, NATURAL,
    )  # fmt: skip
    finish(added, scales, sums, y, y, M, N, first, GROUP, SUMS, False, F, RT)


def decode_parts(
    x: Tensor,
    weight: Fragments,
    L: Fragments,
    R: Fragments,
    rows: Sequence[int],
    *,
    split: Split | None = None,
    second: Split | None = None,
) -> Tensor:
    """y bfloat16 [M, sum(rows)] for x bfloat16 [M, K], M up to 64.

    Args:
        weight: of all parts, 2:4 or dense.
        L: [parts r, K], dense; r is a multiple of 16 if there is more than one part.
        R: [sum(rows), r], dense.
        rows: of each part, multiples of 16 but the last.
        split, second: how programs share the weights of the launches, `split_for` by default.
    """
    check("decode_parts", x, weight)
    check("decode_parts: L", x, L)
    check_weight("decode_parts: R", R, x.device)
    torch._check(
        len(rows) <= PARTS and all(N % ROWS == 0 for N in rows[:-1]) and sum(rows) == R.N,
        lambda: f"decode_parts: rows {list(rows)}, not up to {PARTS} multiples of {ROWS}",
    )
    torch._check(
        weight.N == R.N
        and L.N == len(rows) * R.K
        and (R.K % ROWS == 0 or len(rows) == 1)
        and L.where == R.where == "dense",
        lambda: (
            f"decode_parts: L has {L.N} rows, the weight {weight.N}, R [{R.N}, {R.K}], which does "
            f"not fit {len(rows)} parts"
        ),
    )
    check_device("decode_parts", x.device)
    M = x.shape[0]
    split = split or split_for(weight.N, weight.K, M)
    each = -(-R.K // ROWS) * ROWS
    y, z = launch_decode(x, weight, split, L=L, each=each)
    return _second(y, z, R, rows, M, second or split_for(R.N, R.K, M, alone=False))


def _second(
    sums: Tensor, z: Tensor, R: Fragments, rows: Sequence[int], M: int, split: Split
) -> Tensor:
    """The sums with what R makes of z added."""
    N = R.N
    if any(n % (ROWS * split.tiles) for n in rows[:-1]):  # a program's tiles are of one part
        split = Split(1, split.warps)
    ends = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
    ends += [_NEVER] * (PARTS - 1 - len(ends))
    y = torch.empty(M, N, dtype=torch.bfloat16, device=z.device)
    given = constants(R, M) | {"NATURAL": False}
    compiled = add_parts_kernel[(-(-N // (ROWS * split.tiles)),)](
        z.view(torch.int32), M, R.data, R.scale.view(torch.int32), sums, y, N, *ends,
        **given, RT=split.tiles, NW=split.warps, SUMS=sums.shape[0],
        num_warps=split.warps, **early(z.device),
    )  # fmt: skip
    check_layout("decode_parts", compiled, split.warps)
    return y
