"""A 2:4 weight of four bits on sparse tensor cores: the numbers, and the machine code."""

from __future__ import annotations

from dataclasses import replace

import offline
import pytest
import torch
from cpu_linears import matrix
from slimfx.runtime.fragments import Fragments, dense_weight, fragments, stacked
from slimfx.runtime.kernels.decode_24 import decode_24, decode_24_kernel
from slimfx.runtime.kernels.mma import Split, constants
from slimfx.runtime.kernels.warp import is_by_lane
from slimfx.runtime.pack import Packed24
from torch import Tensor

ROUNDING = 2**-8
"""Of a bfloat16 result, relative; float32 sums add far less."""
TYPES = {
    **{"x": "*i32", "XS": "i32", "M": "i32", "words": "*i32", "scales": "*i32"},
    **{"bias": "*bf16", "y": "*bf16", "N": "i32", "L_words": "*i32", "L_scales": "*i32"},
    **{"z": "*bf16", "RANK": "i32"},
}


def weight(N: int, K: int, scales: str, group: int = 32) -> Fragments:
    """Random, laid out; `scales` as in `cpu_linears.matrix`."""
    draw = torch.Generator().manual_seed(N * K)
    stored = matrix(("2:4", 4), N, K, draw, scales=scales)
    assert isinstance(stored, Packed24) and stored.scale is not None
    if scales == "group":
        scale = stored.scale[:, :: group // 32].contiguous()
        stored = Packed24(stored.values, stored.indices, scale, 4, group)
    return fragments(stored, K)


def adapter(N: int, K: int) -> Fragments:
    """Random, dense, in groups of 32."""
    draw = torch.Generator().manual_seed(N + K)
    return fragments(matrix(("dense", 4), N, K, draw, scales="group"), K)


def to(device: str, matrix: Fragments) -> Fragments:
    """The same on a device."""
    return replace(matrix, data=matrix.data.to(device), scale=matrix.scale.to(device))


def dense(matrix: Fragments) -> Tensor:
    """The weight in float64."""
    return dense_weight(matrix, torch.float64)


def product(
    device: str, M: int, N: int, K: int, scales: str, group: int, split: Split, bias: bool
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and the same in float64."""
    draw = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=draw).bfloat16()
    b = torch.randn(N, generator=draw).bfloat16() if bias else None
    W = weight(N, K, scales, group)
    there = None if b is None else b.to(device)
    y = decode_24(x.to(device), to(device, W), bias=there, split=split).cpu()
    return y, x.double() @ dense(W).T + (0 if b is None else b.double())


CASES = {
    "one row": (1, 16, 256, "tensor", 32, Split(1, 1)),
    "two tiles, two warps, odd rows": (3, 35, 520, "row", 32, Split(2, 2)),
    "groups of 32": (8, 16, 320, "group", 32, Split(1, 2)),
    "groups of 64": (2, 20, 512, "group", 64, Split(1, 1)),
    "groups of 128, shared inputs": (3, 24, 1024, "group", 128, Split(2, 2, 2)),
    "groups of 192": (1, 16, 384, "group", 192, Split(1, 1)),
    "nine rows, groups of 512": (9, 16, 1280, "group", 512, Split(1, 2)),
    "sixteen rows, groups of 32": (16, 40, 256, "group", 32, Split(2, 1)),
    "sixteen rows, shared inputs": (16, 32, 1536, "tensor", 32, Split(2, 2, 3)),
    "four tiles": (1, 70, 512, "tensor", 32, Split(4, 2)),
    "few inputs": (5, 7, 36, "row", 32, Split(1, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_multiplies(run: offline.Run, name: str) -> None:
    y, wanted = run(product, *CASES[name], len(name) % 2 == 0)
    torch.testing.assert_close(y.double(), wanted, rtol=ROUNDING, atol=1e-4)


def test_two_runs_give_the_same_bits(run: offline.Run) -> None:
    one, two = (run(product, *CASES["groups of 128, shared inputs"], True)[0] for _ in "12")
    assert torch.equal(one, two)


def adapted(device: str, M: int, rank: int, split: Split | None) -> tuple[Tensor, Tensor, Tensor]:
    """With adapters: y, the same in float64, and how far the rounding of x L^T may move y."""
    N, K = 40, 512
    draw = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=draw).bfloat16()
    b = torch.randn(N, generator=draw)
    W, L, R = weight(N, K, "tensor"), adapter(rank, K), adapter(N, rank)
    given = {"L": to(device, L), "R": to(device, R), "bias": b.to(device), "split": split}
    y = decode_24(x.to(device), to(device, W), **given).cpu()
    z = x.double() @ dense(L).T
    wanted = x.double() @ dense(W).T + z @ dense(R).T + b
    slack = z.abs() * ROUNDING @ dense(R).abs().T
    return y, wanted, slack


@pytest.mark.parametrize(
    ("M", "rank", "split"), [(1, 16, None), (3, 37, None), (9, 50, Split(2, 2))]
)
def test_it_adds_what_the_adapters_make(run: offline.Run, M: int, rank: int, split: Split) -> None:
    y, wanted, slack = run(adapted, M, rank, split)
    assert ((y.double() - wanted).abs() <= wanted.abs() * ROUNDING + slack + 1e-4).all()
    assert slack.max() < wanted.abs().max() / 50  # or it would hide a mistake


def joined(device: str, M: int, rank: int) -> tuple[Tensor, Tensor]:
    """Two linears that read one x, together and each on its own."""
    draw = torch.Generator().manual_seed(M)
    x = torch.randn(M, 512, generator=draw).bfloat16().to(device)
    W = [weight(N, 512, "row") for N in (32, 32)]
    W[1] = replace(W[1], scale=W[1].scale * 3)
    L, R = [adapter(rank, 512), adapter(rank, 512)], [adapter(32, rank), adapter(32, rank)]
    L[1] = replace(L[1], scale=-L[1].scale)
    parts = [tuple(to(device, part) for part in linear) for linear in zip(W, L, R, strict=True)]
    apart = [decode_24(x, w, L=low, R=high) for w, low, high in parts]
    first, low, high = (stacked(of) for of in zip(*parts, strict=True))
    return decode_24(x, first, L=low, R=high).cpu(), torch.cat(apart, 1).cpu()


@pytest.mark.parametrize(("M", "rank"), [(2, 20), (9, 16)])
def test_linears_that_read_one_x_run_together(run: offline.Run, M: int, rank: int) -> None:
    together, apart = run(joined, M, rank)
    assert torch.equal(together, apart)


def beyond(device: str) -> Tensor:
    """Rows of x, one of them not finite."""
    x = torch.ones(3, 256).bfloat16()
    x[1, 5] = torch.inf
    return decode_24(x.to(device), to(device, weight(16, 256, "tensor"))).cpu()


def test_a_row_that_is_not_finite_spoils_no_other(run: offline.Run) -> None:
    y = run(beyond)
    assert y[0].isfinite().all() and torch.equal(y[0], y[2])
    assert not y[1].isfinite().all()


def test_what_it_would_misread_is_refused() -> None:
    W, x = weight(16, 64, "tensor"), torch.randn(2, 64).bfloat16()
    with pytest.raises(RuntimeError, match="the weight is dense on cpu, not 2:4"):
        decode_24(x, adapter(16, 64))
    with pytest.raises(RuntimeError, match="L and R are there or not together"):
        decode_24(x, W, L=adapter(16, 64))
    with pytest.raises(RuntimeError, match=r"R is \[32, 16\], not \[16, 16\] or"):
        decode_24(x, W, L=adapter(16, 64), R=adapter(32, 16))


def compiled(target: str, rows: int, group: int, split: Split, low: bool) -> object:
    """The kernel for [N, 32768], as a launch on such a GPU would have it."""
    nothing = torch.empty(0)
    first = constants(Fragments(nothing, nothing, "dense", 512, 32768, 128), rows)
    given = constants(Fragments(nothing, nothing, "2:4", 4096, 32768, group), rows)
    given |= {"RT": split.tiles, "NW": split.warps, "SK": split.programs, "BIAS": False}
    given |= {"LOW": low, "L_GROUP": first["GROUP"], "L_PART": first["PART"]}
    given |= {"L_TEXT": first["TEXT0"], "L_KINDS": first["KINDS"]}
    return offline.compile(
        decode_24_kernel, TYPES, given, target, warps=split.warps, multiples=("XS", "N", "RANK")
    )


LIMITS = {
    # target, rows of x, group, tiles, L too: instructions and INT of a dense weight
    ("sm_90", 1, 32768, 2, False): (1.2, 0.55),
    ("sm_90", 1, 32768, 2, True): (1.2, 0.55),
    ("sm_90", 1, 32768, 4, False): (1.0, 0.52),
    ("sm_90", 1, 128, 2, False): (1.3, 0.65),
    ("sm_90", 16, 32768, 2, True): (1.3, 0.55),
    ("sm_80", 1, 32768, 2, False): (1.2, 0.55),
}


@pytest.mark.parametrize(("target", "rows", "group", "tiles", "low"), LIMITS)
def test_the_loop_is_short(target: str, rows: int, group: int, tiles: int, low: bool) -> None:
    split = Split(tiles, 8)
    kernel = compiled(target, rows, group, split, low)
    assert is_by_lane(kernel.asm["ttgir"], split.warps)
    code = offline.sass(kernel)
    weights = 256 * 16 * split.tiles // 32  # dense ones, of a thread in a turn
    loop = code.loop_with("HMMA.SP")
    turns = offline.count(loop, "HMMA.SP") // (8 * split.tiles * (2 if rows > 8 else 1))
    assert turns >= 1 and code.spills == 0
    assert offline.count(loop, *offline.EXCHANGE) == 0
    total = len(loop) / (turns * weights)
    integers = offline.count(loop, *offline.INT) / (turns * weights)
    name = f"{target}, {rows} rows, groups of {group}, {tiles} tiles{', L too' if low else ''}"
    print(f"{name}: {total:.2f} instructions a dense weight, INT {integers:.2f}")
    assert offline.count(loop, "LDG.128") == 3 * split.tiles * turns  # the weight's words
    assert total <= LIMITS[target, rows, group, tiles, low][0]
    assert integers <= LIMITS[target, rows, group, tiles, low][1]
