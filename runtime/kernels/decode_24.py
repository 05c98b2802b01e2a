"""y = x W^T for up to 16 rows of x and a 2:4 weight of four bits, on sparse tensor cores.

    decode_24     y = x W^T [+ (x L^T) R^T] [+ bias]

The rows of L, dense and of four bits too, are further tiles of the same launch; a second one adds
what R makes of them. Every sum is taken in one order, so that two runs give the same bits.
"""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

import torch
from slimfx.runtime.fragments import ROWS, Fragments
from slimfx.runtime.kernels.decode_int4 import launch_int4
from slimfx.runtime.kernels.launch import (
    check,
    check_device,
    check_layout,
    check_weight,
    pairs,
    sum_parts,
)
from slimfx.runtime.kernels.mma import Split, constants, split_for
from slimfx.runtime.kernels.warp import accumulate, finish
from torch import Tensor

from slimfx.errors import need

triton = need("triton")
tl = need("triton.language")


@triton.jit(do_not_specialize=["M"])
def decode_24_kernel(
    x, XS, M, words, scales, bias, y, N, L_words, L_scales, z, RANK,
    K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, TEXT0: tl.constexpr,
    TEXT1: tl.constexpr, KINDS: tl.constexpr, F: tl.constexpr, RT: tl.constexpr,
    NW: tl.constexpr, SK: tl.constexpr, BIAS: tl.constexpr, LOW: tl.constexpr,
    L_GROUP: tl.constexpr, L_PART: tl.constexpr, L_TEXT: tl.constexpr, L_KINDS: tl.constexpr,
):  # fmt: skip
    """y [SK, M, N], and before it z [M, RANK], whose tiles the first programs take if LOW."""
    program = tl.program_id(0)
    if LOW:
        ahead = (RANK // 16 + RT - 1) // RT
        if program < ahead:
            low = accumulate(
                x, XS, M, L_words, L_scales, program * RT, RANK // 16, 0,
                False, K, L_GROUP, L_PART, L_TEXT, L_TEXT, L_KINDS, F, RT, NW, 1,
            )  # fmt: skip
            finish(low, L_scales, z, z, z, M, RANK, program * RT, L_GROUP, 0, False, F, RT)
        else:
            _rows(
                program - ahead, x, XS, M, words, scales, bias, y, N,
                K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, SK, BIAS,
            )  # fmt: skip
    else:
        _rows(
            program, x, XS, M, words, scales, bias, y, N,
            K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, SK, BIAS,
        )  # fmt: skip


@triton.jit
def _rows(
    program, x, XS, M, words, scales, bias, y, N,
    K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, TEXT0: tl.constexpr,
    TEXT1: tl.constexpr, KINDS: tl.constexpr, F: tl.constexpr, RT: tl.constexpr,
    NW: tl.constexpr, SK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Each program RT tiles of 16 rows and one of SK shares of the inputs."""
    first = program // SK * RT
    share = program % SK
    sums = accumulate(
        x, XS, M, words, scales, first, (N + 15) // 16, share,
        True, K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, SK,
    )  # fmt: skip
    at = y + share.to(tl.int64) * M * N
    finish(sums, scales, y, bias, at, M, N, first, GROUP, 0, BIAS, F, RT)


def decode_24(
    x: Tensor,
    weight: Fragments,
    *,
    L: Fragments | None = None,
    R: Fragments | None = None,
    bias: Tensor | None = None,
    split: Split | None = None,
) -> Tensor:
    """y bfloat16 [M, N] for x bfloat16 [M, K], M up to 16.

    Args:
        L: adapter [r, K], dense; R [N, r] with it. Where the weight is `stacked` of several of as
            many rows, so may be their L, and their R, of one rank.
        bias: [N].
        split: how programs share the weight, `split_for` by default.
    """
    check("decode_24", x, weight, "2:4")
    M, N = x.shape[0], weight.N
    split = split or split_for(N, weight.K, two=M > 8)
    rank = _check_adapters(x, weight, L, R)
    check_device("decode_24", x.device)
    alone = split.programs == 1 and L is None
    y = torch.empty(
        *(split.programs, M, N),
        dtype=torch.bfloat16 if alone else torch.float32,
        device=x.device,
    )
    z = torch.empty(M, rank, dtype=torch.bfloat16, device=x.device)
    first = L or weight  # anything of its kind, where there is no L
    here = bias if alone else None
    words = pairs(x)
    programs = -(-N // (ROWS * split.tiles)) * split.programs + -(-rank // (ROWS * split.tiles))
    compiled = decode_24_kernel[(programs,)](
        words, words.stride(0), M, weight.data, weight.scale.view(torch.int32),
        y if here is None else here, y, N, first.data, first.scale.view(torch.int32), z, rank,
        **constants(weight, M), RT=split.tiles, NW=split.warps, SK=split.programs,
        BIAS=here is not None, LOW=L is not None, **_of_L(constants(first, M)),
        num_warps=split.warps,
    )  # fmt: skip
    check_layout("decode_24", compiled, split.warps)
    if R is not None:
        joined = rank // _whole(R.K)
        second = split_for(N // joined, R.K, two=M > 8, alone=False)
        if joined > 1:
            second = Split(1, second.warps)
        return launch_int4(pairs(z), R, second, bias=bias, parts=y, joined=joined)
    return y[0] if alone else sum_parts(y, bias)


def _check_adapters(x: Tensor, weight: Fragments, L: Fragments | None, R: Fragments | None) -> int:
    """The rank, in whole tiles; 0 without adapters."""
    if L is None or R is None:
        torch._check(L is R, lambda: "decode_24: L and R are there or not together")
        return 0
    check("decode_24: L", x, L, "dense")
    check_weight("decode_24: R", R, "dense", x.device)
    joined = _whole(L.N) // _whole(R.K)
    torch._check(
        R.N == weight.N
        and L.N == max(0, joined - 1) * _whole(R.K) + R.K
        and (joined == 1 or weight.N % (joined * ROWS) == 0),
        lambda: (
            f"decode_24: R is [{R.N}, {R.K}], not [{weight.N}, {L.N}] or, of several matrices of "
            f"a multiple of {ROWS} rows, [{weight.N}, their rank]"
        ),
    )
    return _whole(L.N)


def _whole(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def _of_L(given: dict[str, int | str]) -> dict[str, int | str]:
    names = {"GROUP": "L_GROUP", "PART": "L_PART", "TEXT0": "L_TEXT", "KINDS": "L_KINDS"}
    return {name: given[key] for key, name in names.items()}
