"""y = x W^T for up to 16 rows of x and a dense weight of four bits, on tensor cores.

    decode_int4     y = x W^T [+ bias]

Every sum is taken in one order, so that two runs give the same bits.
"""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

import torch
from slimfx.runtime.fragments import ROWS, Fragments
from slimfx.runtime.kernels.launch import check, check_device, check_layout, pairs, sum_parts
from slimfx.runtime.kernels.mma import Split, constants, split_for
from slimfx.runtime.kernels.warp import accumulate, finish
from torch import Tensor

from slimfx.errors import need

triton = need("triton")
tl = need("triton.language")


@triton.jit(do_not_specialize=["M"])
def decode_int4_kernel(
    x, XS, M, words, scales, parts, bias, y, N, EACH, STEP,
    K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, TEXT0: tl.constexpr,
    TEXT1: tl.constexpr, KINDS: tl.constexpr, F: tl.constexpr, RT: tl.constexpr,
    NW: tl.constexpr, SK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y [SK, M, N]: each program RT tiles of 16 rows and one of SK shares of the inputs, which
    begin STEP words later for every EACH tiles.
    """
    first = tl.program_id(0) // SK * RT
    share = tl.program_id(0) % SK
    sums = accumulate(
        x + first // EACH * STEP, XS, M, words, scales, first, (N + 15) // 16, share,
        False, K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, SK,
    )  # fmt: skip
    at = y + share.to(tl.int64) * M * N
    finish(sums, scales, parts, bias, at, M, N, first, GROUP, PARTS, BIAS, F, RT)


def decode_int4(
    x: Tensor, weight: Fragments, *, bias: Tensor | None = None, split: Split | None = None
) -> Tensor:
    """y bfloat16 [M, N] for x bfloat16 [M, K], M up to 16.

    Args:
        bias: [N].
        split: how programs share the weight, `split_for` by default.
    """
    check("decode_int4", x, weight, "dense")
    check_device("decode_int4", x.device)
    split = split or split_for(weight.N, weight.K, two=x.shape[0] > 8)
    return launch_int4(pairs(x), weight, split, bias=bias)


def launch_int4(
    x: Tensor,
    weight: Fragments,
    split: Split,
    *,
    bias: Tensor | None = None,
    parts: Tensor | None = None,
    joined: int = 1,
) -> Tensor:
    """`decode_int4` of x as `pairs` gives it, plus parts float32 [P, M, N] in order.

    The weight may be `joined` ones of as many rows each, that take as many equal parts of x.
    """
    M, N, alone = x.shape[0], weight.N, split.programs == 1
    if not alone and parts is not None:
        raise AssertionError("launch_int4: parts are added where programs do not share inputs")
    y = torch.empty(
        *(split.programs, M, N),
        dtype=torch.bfloat16 if alone else torch.float32,
        device=x.device,
    )
    tiles, here = -(-N // ROWS), bias if alone else None
    if tiles // joined % split.tiles and joined > 1:
        raise AssertionError("launch_int4: a program would take tiles of two of the joined weights")
    compiled = decode_int4_kernel[(-(-tiles // split.tiles) * split.programs,)](
        x, x.stride(0), M, weight.data, weight.scale.view(torch.int32),
        y if parts is None else parts, y if here is None else here, y, N,
        tiles // joined, x.shape[1] // joined if joined > 1 else 0,
        **constants(weight, M), RT=split.tiles, NW=split.warps, SK=split.programs,
        PARTS=0 if parts is None else parts.shape[0], BIAS=here is not None,
        num_warps=split.warps,
    )  # fmt: skip
    check_layout("decode_int4", compiled, split.warps)
    return y[0] if alone else sum_parts(y, bias)
