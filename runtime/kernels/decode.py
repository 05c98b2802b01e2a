"""y = x W^T for up to 64 rows of x and a weight of four bits, on tensor cores.

    decode      y = x W^T [+ bias]

A 2:4 weight takes the sparse ones. The programs for rows of W and those for rows of an adapter L,
which read the same x, are one launch. Every sum is taken in one order, so that two runs give the
same bits.
"""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

import torch
from slimfx.runtime.fragments import ROWS, Fragments
from slimfx.runtime.kernels.launch import (
    arranged,
    check,
    check_device,
    check_layout,
    early,
    sum_parts,
)
from slimfx.runtime.kernels.mma import Split, constants, split_for
from slimfx.runtime.kernels.warp import accumulate, finish, finish_low
from torch import Tensor

from slimfx.errors import need

triton = need("triton")
tl = need("triton.language")


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    x, M, words, scales, bias, y, N, L_words, L_scales, z, RANK, EACH,
    SPARSE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr, F: tl.constexpr,
    NATURAL: tl.constexpr, RT: tl.constexpr, NW: tl.constexpr, SK: tl.constexpr,
    BIAS: tl.constexpr, LOW: tl.constexpr, L_GROUP: tl.constexpr, L_PART: tl.constexpr,
    L_TEXT: tl.constexpr, L_KINDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y [SK, M, N], and before it z = x L^T, whose tiles the first programs take if LOW: RANK rows
    of L, EACH for a weight.
    """
    program = tl.program_id(0)
    if LOW:
        ahead = (RANK // 16 + RT - 1) // RT
        if program < ahead:
            low = accumulate(
                x, M, L_words, L_scales, program * RT, RANK // 16, 0, False, K, L_GROUP,
                L_PART, L_TEXT, L_TEXT, L_KINDS, F, RT, NW, 1, EARLY, NATURAL,
            )  # fmt: skip
            finish_low(low, L_scales, z, M, RANK, program * RT, EACH, L_GROUP, F, RT)
        else:
            _rows(
                program - ahead, x, M, words, scales, bias, y, N, SPARSE, K, GROUP, PART, TEXT0,
                TEXT1, KINDS, F, RT, NW, SK, BIAS, EARLY, NATURAL,
            )  # fmt: skip
    else:
        _rows(
            program, x, M, words, scales, bias, y, N, SPARSE, K, GROUP, PART, TEXT0,
            TEXT1, KINDS, F, RT, NW, SK, BIAS, EARLY, NATURAL,
        )  # fmt: skip


@triton.jit
def _rows(
    program, x, M, words, scales, bias, y, N,
    SPARSE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr, F: tl.constexpr,
    RT: tl.constexpr, NW: tl.constexpr, SK: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Each program RT tiles of 16 rows and one of SK shares of the inputs."""
    first = program // SK * RT
    share = program % SK
    sums = accumulate(
        x, M, words, scales, first, (N + 15) // 16, share,
        SPARSE, K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, SK, EARLY, NATURAL,
    )  # fmt: skip
    at = y + share.to(tl.int64) * M * N
    finish(sums, scales, y, bias, at, M, N, first, GROUP, 0, BIAS, F, RT)


def decode(
    x: Tensor, weight: Fragments, *, bias: Tensor | None = None, split: Split | None = None
) -> Tensor:
    """y bfloat16 [M, N] for x bfloat16 [M, K], M up to 64.

    Args:
        bias: [N].
        split: how programs share the weight, `split_for` by default.
    """
    check("decode", x, weight)
    check_device("decode", x.device)
    split = split or split_for(weight.N, weight.K, x.shape[0])
    y, _ = launch_decode(x, weight, split, bias=bias)
    return y[0] if split.programs == 1 else sum_parts(y, bias)


def launch_decode(
    x: Tensor,
    weight: Fragments,
    split: Split,
    *,
    L: Fragments | None = None,
    each: int = 0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x W^T of each share of the inputs, float32 [P, M, N], and x L^T bfloat16 as `arranged` would
    leave it, for each weight's `each` rows of L. Without L [1, M, N] bfloat16 of the only share,
    with the bias.
    """
    M, N = x.shape[0], weight.N
    rank = 0 if L is None else -(-L.N // ROWS) * ROWS
    alone = split.programs == 1 and L is None
    y = torch.empty(
        *(split.programs, M, N),
        dtype=torch.bfloat16 if alone else torch.float32,
        device=x.device,
    )
    own = constants(weight, M)
    low = -(-each // 32) * 32 * (rank // max(1, each))
    z = torch.empty(low * 8 * int(own["F"]), dtype=torch.bfloat16, device=x.device)
    first = L or weight  # anything of its kind, where there is no L
    of_L = constants(first, M)
    here = bias if alone else None
    programs = -(-N // (ROWS * split.tiles)) * split.programs + -(-rank // (ROWS * split.tiles))
    compiled = decode_kernel[(programs,)](
        arranged(x), M, weight.data, weight.scale.view(torch.int32),
        y if here is None else here, y, N, first.data, first.scale.view(torch.int32), z, rank,
        max(1, each), SPARSE=weight.where == "2:4", **own, RT=split.tiles, NW=split.warps,
        SK=split.programs, BIAS=here is not None, LOW=L is not None,
        L_GROUP=of_L["GROUP"], L_PART=of_L["PART"], L_TEXT=of_L["TEXT0"],
        L_KINDS=of_L["KINDS"], num_warps=split.warps, **early(x.device),
    )  # fmt: skip
    check_layout("decode", compiled, split.warps)
    return y, z
