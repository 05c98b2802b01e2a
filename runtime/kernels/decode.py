"""y = x W^T for up to 64 rows of x and a weight of four bits, on tensor cores.

    decode          y = x W^T [+ bias]
    decode_parts    y = [x W_1^T + (x L_1^T) R_1^T, x W_2^T + (x L_2^T) R_2^T, ...]

A 2:4 weight takes the sparse ones. Linears that share x follow each other by rows, and so do their
adapters, each in one matrix. A first launch makes x L^T of them all; the second begins while it
runs, multiplies by W, waits for it, and adds the product with R before y is stored. Every sum is
taken in one order, so that two runs give the same bits.
"""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

from collections.abc import Sequence

import torch
from slimfx.runtime.fragments import ROWS, Fragments
from slimfx.runtime.kernels.launch import (
    PARTS,
    arranged,
    check,
    check_device,
    check_layout,
    check_weight,
    early,
    starts_of,
)
from slimfx.runtime.kernels.mma import Split, constants, split_for, split_for_low
from slimfx.runtime.kernels.warp import begin, drain, finish, finish_low, reduce, stream, zeros
from torch import Tensor

from slimfx.errors import need

triton = need("triton")
tl = need("triton.language")
_cuda = need("triton.language.extra.cuda")
_begin_next, _wait = _cuda.gdc_launch_dependents, _cuda.gdc_wait


@triton.jit
def places(NW: tl.constexpr, AC: tl.constexpr, RT: tl.constexpr):
    """Of each row of a program's tensors: lane, turn, first tile; and the columns."""
    r = tl.arange(0, 32 * NW * AC)[:, None]
    first = tl.program_id(0) * (RT * AC)
    if AC > 1:
        first += r // (32 * NW) * RT
    return r % 32, r // 32 % NW, first, tl.arange(0, 4)[None, :]


@triton.jit(do_not_specialize=["M"])
def low_kernel(
    x, M, words, scales, z, RANK, EACH,
    K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, TEXT: tl.constexpr,
    KINDS: tl.constexpr, F: tl.constexpr, ROW: tl.constexpr, RT: tl.constexpr, NW: tl.constexpr,
    AC: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """z = x L^T, RANK rows of L, EACH for a linear.

    The launch behind may begin when what made x has ended, not before: it reads x as well, and
    waits only for this launch, and late.
    """
    lane, kb, first, c = places(NW, AC, RT)
    words += lane * 4
    scales += lane // 4
    TILES = RANK // 16
    begun = begin(words, scales, first, TILES, kb, c, False, K, GROUP, PART, RT, NW, AHEAD)
    if EARLY:
        _wait()
        _begin_next()
    none = zeros(32 * NW * AC, RT * F)
    streamed = stream(
        none, begun, x, M, words, scales, first, TILES, kb, lane, c,
        False, K, GROUP, PART, TEXT, TEXT, KINDS, F, RT, NW, AC, AHEAD, ROW, False,
    )  # fmt: skip
    sums = drain(
        none, streamed, begun, x, M, kb, lane, c,
        False, K, GROUP, PART, TEXT, TEXT, KINDS, F, RT, NW, AC, AHEAD, ROW, False,
    )  # fmt: skip
    sums = reduce(sums, RT * F, NW, AC, ROW)
    finish_low(sums, z, M, RANK, tl.program_id(0) * (RT * AC), EACH, F, RT, AC, ROW)


@triton.jit(do_not_specialize=["M", "N1", "N2", "N3"])
def decode_kernel(
    x, M, words, scales, bias, y, N, z, R_words, R_scales, N1, N2, N3,
    SPARSE: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    TEXT0: tl.constexpr, TEXT1: tl.constexpr, KINDS: tl.constexpr, F: tl.constexpr,
    ROW: tl.constexpr, RT: tl.constexpr, NW: tl.constexpr, AC: tl.constexpr, AHEAD: tl.constexpr,
    BIAS: tl.constexpr, RANK: tl.constexpr, R_GROUP: tl.constexpr, R_PART: tl.constexpr,
    R_TEXT: tl.constexpr, R_KINDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x W^T, plus z R^T of RANK inputs if there are any: the second linear's rows begin
    at N1, the third's at N2.
    """
    lane, kb, first, c = places(NW, AC, RT)
    words += lane * 4
    scales += lane // 4
    TILES = (N + 15) // 16
    if EARLY:
        _begin_next()
    begun = begin(words, scales, first, TILES, kb, c, SPARSE, K, GROUP, PART, RT, NW, AHEAD)
    if EARLY and RANK == 0:
        _wait()
    none = zeros(32 * NW * AC, RT * F)
    streamed = stream(
        none, begun, x, M, words, scales, first, TILES, kb, lane, c,
        SPARSE, K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, AC, AHEAD, ROW, False,
    )  # fmt: skip
    if RANK > 0:
        R_words += lane * 4
        R_scales += lane // 4
        more = begin(
            R_words, R_scales, first, TILES, kb, c, False, RANK, R_GROUP, R_PART, RT, NW, 1
        )
    sums = drain(
        none, streamed, begun, x, M, kb, lane, c,
        SPARSE, K, GROUP, PART, TEXT0, TEXT1, KINDS, F, RT, NW, AC, AHEAD, ROW, False,
    )  # fmt: skip
    if RANK > 0:
        if EARLY:
            _wait()
        row = first * 16
        part = (row >= N1).to(tl.int32) + (row >= N2).to(tl.int32) + (row >= N3).to(tl.int32)
        z += part * ((RANK + 31) // 32 * (16 if ROW else 128 * F))
        streamed = stream(
            none if R_GROUP == 0 else sums, more, z, M, R_words, R_scales, first, TILES, kb,
            lane, c, False, RANK, R_GROUP, R_PART, R_TEXT, R_TEXT, R_KINDS, F, RT, NW, AC, 1, ROW,
            True,
        )  # fmt: skip
        sums = drain(
            sums, streamed, more, z, M, kb, lane, c,
            False, RANK, R_GROUP, R_PART, R_TEXT, R_TEXT, R_KINDS, F, RT, NW, AC, 1, ROW, True,
        )  # fmt: skip
    sums = reduce(sums, RT * F, NW, AC, ROW)
    finish(sums, bias, y, M, N, tl.program_id(0) * (RT * AC), BIAS, F, RT, AC, ROW)


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
    return _second(arranged(x), x, weight, None, None, [weight.N], split, bias)


def decode_parts(
    x: Tensor,
    weight: Fragments,
    L: Fragments,
    R: Fragments,
    rows: Sequence[int],
    *,
    split: Split | None = None,
    low: Split | None = None,
) -> Tensor:
    """y bfloat16 [M, sum(rows)] for x bfloat16 [M, K], M up to 64.

    Args:
        weight: of all parts, 2:4 or dense.
        L: [parts r, K], dense; r is a multiple of 16 if there is more than one part.
        R: [sum(rows), r], dense.
        rows: of each part, multiples of 16 but the last.
        split, low: how programs share the weight, and L; `split_for` and `split_for_low` by
            default.
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
    words = arranged(x)
    return _second(words, x, weight, _first(words, x, L, R, low), R, rows, split, None)


def _first(words: Tensor, x: Tensor, L: Fragments, R: Fragments, split: Split | None) -> Tensor:
    """x L^T as the second launch takes it, for each linear the rows of L that are its own."""
    M, each = x.shape[0], -(-R.K // ROWS) * ROWS
    rank = -(-L.N // ROWS) * ROWS
    split = split or split_for_low(L.K, M)
    own = constants(L, M)
    row, text = M == 1, own.pop("TEXT0")
    del own["TEXT1"]
    wide = -(-each // 32) * 32 * (rank // each)
    z = torch.empty(
        wide if row else wide * 8 * int(own["F"]), dtype=torch.bfloat16, device=x.device
    )
    compiled = low_kernel[(-(-rank // (ROWS * split.tiles * split.across)),)](
        words, M, L.data, L.scale.view(torch.int32), z, rank, each, **own, TEXT=text, ROW=row,
        RT=split.tiles, NW=split.warps, AC=split.across, AHEAD=split.ahead,
        num_warps=split.warps * split.across, **early(x.device),
    )  # fmt: skip
    check_layout("decode_parts", compiled, split.warps * split.across)
    return z


def _second(
    words: Tensor,
    x: Tensor,
    weight: Fragments,
    z: Tensor | None,
    R: Fragments | None,
    rows: Sequence[int],
    split: Split | None,
    bias: Tensor | None,
) -> Tensor:
    """x W^T, with z R^T of each linear or the bias added."""
    M, N = x.shape[0], weight.N
    split = split or split_for(N, weight.K, M)
    if any(n % (ROWS * split.tiles) for n in rows[:-1]):  # a program's tiles are of one linear
        split = Split(1, split.warps, split.ahead, split.across)
    y = torch.empty(M, N, dtype=torch.bfloat16, device=x.device)
    second = R or weight  # anything of its kind, where there is no R
    of_R = constants(second, M)
    compiled = decode_kernel[(-(-N // (ROWS * split.tiles * split.across)),)](
        words, M, weight.data, weight.scale.view(torch.int32), y if bias is None else bias, y, N,
        words if z is None else z.view(torch.int32), second.data, second.scale.view(torch.int32),
        *starts_of(rows), SPARSE=weight.where == "2:4", **constants(weight, M), ROW=M == 1,
        RT=split.tiles, NW=split.warps, AC=split.across, AHEAD=split.ahead, BIAS=bias is not None,
        RANK=0 if R is None else R.K, R_GROUP=of_R["GROUP"], R_PART=of_R["PART"],
        R_TEXT=of_R["TEXT0"], R_KINDS=of_R["KINDS"],
        num_warps=split.warps * split.across, **early(x.device),
    )  # fmt: skip
    check_layout("decode", compiled, split.warps * split.across)
    return y
