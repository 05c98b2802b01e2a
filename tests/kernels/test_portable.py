"""What the portable kernels have in common: adapters, sums of parts, and how they are launched."""

from __future__ import annotations

from typing import Any

import offline
import pytest
import torch
from cpu_linears import Kind, matrix
from gpu_linears import dense
from slimfx.runtime.kernels import bitmask, portable, portable_24, portable_int4
from slimfx.runtime.kernels.bitmask import bits_of
from slimfx.runtime.kernels.portable import How, Low, add_parts
from slimfx.runtime.kernels.portable_24 import words_24
from slimfx.runtime.kernels.portable_int4 import low_of, words_4
from slimfx.runtime.pack import PackedDense
from torch import Tensor

BF16, F32 = torch.bfloat16, torch.float32
ROUNDING = {BF16: 2**-8, torch.float16: 2**-10, F32: 2**-20}
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "2:4": (words_24, portable_24.portable_24, portable_24),
    "dense": (words_4, portable_int4.portable_int4, portable_int4),
    "bitmask": (bits_of, bitmask.bitmask, bitmask),
}
# Weight, rows of x, rows of each linear, K, scales of W, rank, scales of R, dtype, parts of turns.
CASES: dict[str, tuple[Kind, int, list[int], int, str, int, str, torch.dtype, int]] = {
    "one program has all turns": (("2:4", 4), 3, [70], 256, "row", 37, "group", BF16, 1),
    "the last one has all of R": (("2:4", 4), 17, [64, 32, 7], 256, "row", 48, "group", BF16, 2),
    "R begins with a program": (("2:4", 4), 2, [40], 384, "row", 272, "row", torch.float16, 2),
    "R begins within one, the last has nothing": (
        ("dense", 4), 5, [48, 16], 260, "row", 144, "group", BF16, 5
    ),
    "more programs than turns": (("dense", 4), 64, [32, 20], 130, "row", 16, "tensor", BF16, 4),
    "W in groups": (("2:4", 4), 6, [32, 9], 200, "group", 32, "group", BF16, 3),
    "dense W in groups": (("dense", 4), 3, [20], 192, "group", 40, "row", BF16, 2),
    "three halves": (("2:4", 4), 4, [64, 30], 200, "row", 32, "row", F32, 2),
    "a bitmask": (("bitmask", 3), 9, [128, 64, 16, 5], 256, "row", 32, "group", BF16, 2),
    "a bitmask in groups": (("bitmask", 4), 2, [16, 30], 160, "group", 16, "group", BF16, 2),
}  # fmt: skip


def products(device: str, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, once more, in float64, and of magnitudes."""
    kind, M, rows, K, steps, rank, scales, dtype, split = CASES[name]
    draw = torch.Generator().manual_seed(M)
    N = sum(rows)
    x = torch.randn(M, K, generator=draw).to(dtype)
    b = torch.randn(N, generator=draw).bfloat16()
    W = matrix(kind, N, K, draw, scales=steps)
    L = matrix(("dense", 4), rank * len(rows), K, draw, scales="group")
    R = matrix(("dense", 4), N, rank, draw, scales=scales)
    assert isinstance(L, PackedDense) and isinstance(R, PackedDense)
    read, run, _ = KINDS[kind[0]]
    weight, down, up = (
        offline.to(device, each) for each in (read(W, K), words_4(L, K), words_4(R, rank))
    )
    low = low_of(x.to(device), down, up, rows)
    ways = [How(split, prmt) for prmt in (False, True)]
    y, again = (run(x.to(device), weight, b.to(device), how=how, low=low).cpu() for how in ways)

    def exact(x: Tensor, W: Tensor, L: Tensor, R: Tensor, b: Tensor) -> Tensor:
        z = (x @ L.T).to(dtype).double().split(rank, -1)
        return x @ W.T + torch.cat([a @ r.T for a, r in zip(z, R.split(rows))], -1) + b

    matrices = (dense(W, K), dense(L, K), dense(R, rank), b.double())
    magnitude = exact(x.double().abs(), *(each.abs() for each in matrices))
    return y, again, exact(x.double(), *matrices), magnitude


@pytest.mark.parametrize("name", CASES)
def test_adapters_are_turns_of_the_same_sum(run: offline.Run, name: str) -> None:
    y, again, wanted, magnitude = run(products, name)
    dtype = CASES[name][7]
    assert y.dtype == dtype and torch.equal(y, again)
    # x L^T may be rounded to the neighbour of what it is here, which is a share of the magnitude.
    limit = ROUNDING[dtype] * (wanted.abs() + 0.1 * magnitude)
    assert ((y.double() - wanted).abs() <= limit).all()
    assert limit.mean() < wanted.abs().mean() / 10  # or it would hide a mistake


@pytest.mark.parametrize(
    ("rows", "shape", "N"),
    [
        ([24, 16], (2, 32), 40),  # no multiple of 16
        ([16] * 5, (2, 80), 80),  # five
        ([32], (2, 16), 40),  # too few
        ([40], (2, 32), 40),  # z is too wide
        ([40], (3, 16), 40),  # and too long
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    rows: list[int], shape: tuple[int, int], N: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    W, R = (matrix(("dense", 4), N, K, draw) for K in (128, 16))
    assert isinstance(W, PackedDense) and isinstance(R, PackedDense)
    low = Low(torch.zeros(shape), portable_int4.operand(words_4(R, 16)), rows)
    with pytest.raises(RuntimeError, match=r"portable product: z is .* R \[\d0, 16\]"):
        portable_int4.portable_int4(torch.zeros(2, 128), words_4(W, 128), low=low)


def added(device: str, bias: bool) -> tuple[Tensor, Tensor]:
    """What becomes of parts, and of one addition after the other."""
    draw = torch.Generator().manual_seed(0)
    parts = torch.randn(6, 3, 400, generator=draw) * 10.0 ** torch.arange(6)[:, None, None]
    b = torch.randn(400, generator=draw)
    y = torch.empty(3, 400, device=device)
    add_parts(parts.to(device), b.to(device) if bias else None, y)
    wanted = torch.zeros(3, 400)
    for part in [*parts, *([b] if bias else [])]:
        wanted = wanted + part
    return y.cpu(), wanted


@pytest.mark.parametrize("bias", [False, True])
def test_parts_are_added_in_their_order(run: offline.Run, bias: bool) -> None:
    y, wanted = run(added, bias)
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [0, 128])
def test_adapters_are_multiplied_as_the_weight_is(kind: str, group: int) -> None:
    kernel = KINDS[kind][2]
    own = {"BITS": 4} if kernel is bitmask else {}
    built = offline.portable(
        kernel.product_kernel, offline.STORED, "sm_90", BM=64, GROUP=0, low=group, **own
    )
    code = offline.sass(built)
    loops = [loop for loop in code.loops if offline.count(loop, "HGMMA")]
    assert len(loops) == 2 and code.spills == 0
    assert [offline.count(loop, "LDGSTS.128") for loop in loops] == [8, 8]  # x, and z
    shortest = min(len(loop) for loop in loops) / 64
    print(f"sm_90, {kind}, R in groups of {group}: {shortest:.2f} instructions a weight of R")
    assert shortest <= 5.0


@pytest.mark.parametrize("target", list(offline.TARGETS))
def test_the_sum_of_parts_compiles(target: str) -> None:
    types = {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "size": "i32", "N": "i32"}
    constants = {"COUNT": 4, "BIAS": True, "BLOCK": 1024}
    built = offline.compile(portable._add_parts, types, constants, target)
    assert built.asm["amdgcn" if target == "gfx942" else "cubin"]
