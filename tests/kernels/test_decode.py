"""Weights of four bits on tensor cores, sparse and dense: the numbers, and the machine code."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from typing import Any

import offline
import pytest
import torch
from cpu_linears import matrix
from slimfx.runtime.fragments import Fragments, dense_weight, fragments
from slimfx.runtime.kernels.decode import decode, decode_kernel, low_kernel
from slimfx.runtime.kernels.launch import arranged, check_layout, pairs, why_not_on
from slimfx.runtime.kernels.mma import Split, constants, split_for, split_for_low
from slimfx.runtime.kernels.warp import is_by_lane
from torch import Tensor

from slimfx.errors import SlimError

ROUNDING = 2**-8
"""Of a bfloat16 result, relative; float32 sums add far less."""
TYPES = {
    **{"x": "*i32", "M": "i32", "words": "*i32", "scales": "*i32"},
    **{"bias": "*bf16", "y": "*bf16", "N": "i32", "z": "*i32", "R_words": "*i32"},
    **{"R_scales": "*i32", "N1": "i32", "N2": "i32", "N3": "i32"},
}
LOW_TYPES = {
    **{"x": "*i32", "M": "i32", "words": "*i32", "scales": "*i32", "z": "*bf16"},
    **{"RANK": "i32", "EACH": "i32"},
}


def weight(where: str, N: int, K: int, scales: str, group: int = 32) -> Fragments:
    """Random, laid out; `scales` as in `cpu_linears.matrix`."""
    draw = torch.Generator().manual_seed(N * K)
    stored = matrix((where, 4), N, K, draw, scales=scales)
    if scales == "group":
        scale = stored.scale[:, :: group // 32].contiguous()
        stored = replace(stored, scale=scale, group=group)
    return fragments(stored, K)


def to(device: str, matrix: Fragments) -> Fragments:
    """The same on a device."""
    return replace(matrix, data=matrix.data.to(device), scale=matrix.scale.to(device))


def product(
    device: str,
    where: str,
    M: int,
    N: int,
    K: int,
    scales: str,
    group: int,
    split: Split,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and the same in float64."""
    draw = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=draw).bfloat16()
    b = torch.randn(N, generator=draw).bfloat16() if bias else None
    W = weight(where, N, K, scales, group)
    there = None if b is None else b.to(device)
    y = decode(x.to(device), to(device, W), bias=there, split=split).cpu()
    return y, x.double() @ dense_weight(W, torch.float64).T + (0 if b is None else b.double())


CASES = {
    "one row": (1, 16, 256, "tensor", 32, Split(1, 1)),
    "two tiles, two warps, odd rows": (3, 35, 520, "row", 32, Split(2, 2)),
    "groups of 32": (8, 16, 320, "group", 32, Split(1, 2)),
    "groups of 64": (2, 20, 512, "group", 64, Split(1, 1)),
    "groups of 128, two turns ahead": (3, 24, 1280, "group", 128, Split(2, 2, 2)),
    "groups of 192": (1, 16, 384, "group", 192, Split(1, 1)),
    "nine rows, groups of 256": (9, 16, 768, "group", 256, Split(1, 1)),
    "sixteen rows, groups of 32": (16, 40, 256, "group", 32, Split(2, 1)),
    "sixteen rows, three turns ahead": (16, 32, 1536, "tensor", 32, Split(2, 1, 3)),
    "seventeen rows, groups of 64": (17, 20, 320, "group", 64, Split(2, 1)),
    "64 rows": (64, 40, 512, "row", 32, Split(1, 2)),
    "64 rows, warps across": (64, 72, 512, "tensor", 32, Split(1, 1, 1, 4)),
    "one row, warps both ways": (1, 70, 1300, "row", 32, Split(1, 2, 2, 2)),
    "one row, groups of 128": (1, 40, 2000, "group", 128, Split(1, 1, 3)),
    "four tiles": (1, 70, 512, "tensor", 32, Split(4, 2)),
    "few inputs": (5, 7, 36, "row", 32, Split(1, 2)),
    "one row, few inputs": (1, 7, 36, "row", 32, Split(1, 2)),
}


@pytest.mark.parametrize("where", ["2:4", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_it_multiplies(run: offline.Run, name: str, where: str) -> None:
    y, wanted = run(product, where, *CASES[name], len(name) % 2 == 0)
    torch.testing.assert_close(y.double(), wanted, rtol=ROUNDING, atol=1e-4)


def test_two_runs_give_the_same_bits(run: offline.Run) -> None:
    case = CASES["groups of 128, two turns ahead"]
    one, two = (run(product, "2:4", *case, True)[0] for _ in "12")
    assert torch.equal(one, two)


def beyond(device: str) -> Tensor:
    """Rows of x, one of them not finite."""
    x = torch.ones(3, 256).bfloat16()
    x[1, 5] = torch.inf
    return decode(x.to(device), to(device, weight("2:4", 16, 256, "tensor"))).cpu()


def test_a_row_that_is_not_finite_spoils_no_other(run: offline.Run) -> None:
    y = run(beyond)
    assert y[0].isfinite().all() and torch.equal(y[0], y[2])
    assert not y[1].isfinite().all()


def test_x_may_begin_anywhere() -> None:
    whole = torch.randn(3, 11).bfloat16()
    for x in (whole[:, 1:9], whole[:, :7], whole[1:, ::2], whole.T, whole[:1]):
        words = pairs(x)
        back = words.view(torch.bfloat16)
        assert torch.equal(back[:, : x.shape[1]], x) and not back[:, x.shape[1] :].any()


def rearranged(device: str, M: int, K: int) -> tuple[Tensor, Tensor]:
    """x, and what it becomes."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(K)).bfloat16()
    return x, arranged(x.to(device)).cpu()


@pytest.mark.parametrize(("M", "K"), [(2, 32), (8, 100), (9, 261), (33, 64)])
def test_x_is_arranged_by_lanes(run: offline.Run, M: int, K: int) -> None:
    x, words = run(rearranged, M, K)
    steps, F = -(-K // 32), {2: 1, 8: 1, 9: 2, 33: 8}[M]
    by_lane = words.view(torch.bfloat16).view(steps, F, 8, 4, 4, 2)  # n, g, t, j, half
    back = by_lane.permute(1, 2, 0, 4, 3, 5).reshape(8 * F, 32 * steps)
    assert torch.equal(back[:M, :K], x)
    assert not back[M:].any() and not back[:, K:].any()


def test_what_it_would_misread_is_refused() -> None:
    W = weight("dense", 16, 64, "tensor")
    with pytest.raises(RuntimeError, match=r"x is torch.float32 \(2, 64\), not bfloat16"):
        decode(torch.randn(2, 64), W)
    with pytest.raises(RuntimeError, match=r"not bfloat16 \[1 to 64, 64\]"):
        decode(torch.randn(65, 64).bfloat16(), W)
    odd = torch.empty(W.data.numel() + 1, dtype=torch.int32)[1:].view_as(W.data)
    with pytest.raises(RuntimeError, match="begin at a multiple of 16 bytes"):
        decode(torch.randn(2, 64).bfloat16(), replace(W, data=odd))
    with pytest.raises(RuntimeError, match="the weight is on meta, not on cpu"):
        decode(torch.randn(2, 64).bfloat16(), replace(W, data=W.data.to("meta")))


def test_without_triton_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "slimfx.runtime.kernels.warp")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SlimError, match=r"pip install 'slimfx\[triton\]'"):
        importlib.import_module("slimfx.runtime.kernels.warp")


def test_a_layout_that_the_assembly_does_not_take_is_refused() -> None:
    kernel = compiled("sm_90", "dense", 1, 32768, Split(2, 8))
    check_layout("decode", kernel, 8)
    with pytest.raises(SlimError, match=r"laid its tensors out otherwise"):
        check_layout("decode", kernel, 4)
    asm = {"ttgir": kernel.asm["ttgir"].replace("[32, 1]", "[8, 4]")}
    other = type("Compiled", (), {"asm": asm})
    with pytest.raises(SlimError, match=r"columns in one thread; use Triton 3.6"):
        check_layout("decode", other, 8)


def test_gpus_without_the_instructions_are_left_to_other_kernels() -> None:
    assert why_not_on("cuda", 90) is None
    assert "gfx942 has no mma.sp" in str(why_not_on("hip", "gfx942"))
    assert "older than sm_80" in str(why_not_on("cuda", 75))


@pytest.mark.parametrize("M", [1, 8, 16, 64])
def test_no_warp_is_without_inputs(M: int) -> None:
    for K in (128, 4096, 11008, 28672):
        for N in (16, 1024, 4096, 28672):
            split = split_for(N, K, M)
            assert split.warps <= -(-K // 256) and split.tiles * split.warps <= 4
        assert split_for_low(K, M).warps <= -(-K // 256)


def compiled(
    target: str,
    where: str,
    rows: int,
    group: int,
    split: Split,
    rank: int = 0,
    K: int = 32768,
) -> Any:
    """The kernel for [N, K], as a launch on such a GPU would have it."""
    nothing = torch.empty(0)
    second = constants(Fragments(nothing, nothing, "dense", 4096, rank or 64, 128), rows)
    given = constants(Fragments(nothing, nothing, where, 4096, K, group), rows)
    given |= {"RT": split.tiles, "NW": split.warps, "AC": split.across, "AHEAD": split.ahead}
    given |= {"ROW": rows == 1, "BIAS": False, "RANK": rank, "R_GROUP": second["GROUP"]}
    given |= {"R_PART": second["PART"], "R_TEXT": second["TEXT0"], "R_KINDS": second["KINDS"]}
    given |= {"SPARSE": where == "2:4", "EARLY": target == "sm_90"}
    warps = split.warps * split.across
    return offline.compile(decode_kernel, TYPES, given, target, warps=warps, multiples=("N",))


LIMITS = {
    # target, kind, rows of x, group, tiles, rank: instructions and INT of a weight. One row of x
    # costs 0.06 INT more, which puts it into eight columns, and 28 loads in 256 inputs less.
    ("sm_90", "2:4", 1, 32768, 2, 0): (1.02, 0.61),
    ("sm_90", "2:4", 1, 32768, 2, 416): (1.02, 0.61),
    ("sm_90", "2:4", 1, 32768, 4, 0): (0.9, 0.53),
    ("sm_90", "2:4", 1, 128, 2, 0): (1.2, 0.71),
    ("sm_90", "2:4", 16, 32768, 2, 416): (1.3, 0.55),
    ("sm_90", "2:4", 64, 32768, 1, 416): (2.3, 0.9),
    ("sm_90", "2:4", 32, 32768, 2, 416): (1.3, 0.6),
    ("sm_80", "2:4", 1, 32768, 2, 0): (1.0, 0.61),
    ("sm_90", "dense", 1, 32768, 2, 0): (1.8, 1.05),
    ("sm_90", "dense", 1, 128, 2, 0): (2.0, 1.15),
    ("sm_90", "dense", 16, 128, 2, 0): (2.4, 1.1),
    ("sm_80", "dense", 1, 128, 2, 0): (2.0, 1.15),
}


@pytest.mark.parametrize(("target", "where", "rows", "group", "tiles", "rank"), LIMITS)
def test_the_loop_is_short(
    target: str, where: str, rows: int, group: int, tiles: int, rank: int
) -> None:
    split = Split(tiles, 8, split_for(22016, 32768, rows).ahead)
    kernel = compiled(target, where, rows, group, split, rank)
    assert is_by_lane(kernel.asm["ttgir"], split.warps)
    code = offline.sass(kernel)
    weights = 256 * 16 * split.tiles // 32  # dense ones, of a thread in a turn
    sparse, fragments = where == "2:4", int(constants_of(where, rows)["F"])
    product = "HMMA.SP" if sparse else "HMMA.16816"
    loop = code.loop_with(product)
    turns = offline.count(loop, product) // ((8 if sparse else 16) * split.tiles * fragments)
    assert turns >= 1 and code.spills == 0
    assert offline.count(loop, *offline.EXCHANGE) == 0
    total = len(loop) / (turns * weights)
    integers = offline.count(loop, *offline.INT) / (turns * weights)
    name = f"{target}, {where}, {rows} rows, groups of {group}, {tiles} tiles"
    print(f"{name}, rank {rank}: {total:.2f} instructions, INT {integers:.2f}")
    words = (3 if sparse else 4) * split.tiles * turns + (0 if rows == 1 else 8 * fragments * turns)
    assert offline.count(loop, "LDG.128") == words  # the weight's, and those of x
    assert total <= LIMITS[target, where, rows, group, tiles, rank][0]
    assert integers <= LIMITS[target, where, rows, group, tiles, rank][1]


@pytest.mark.parametrize(("rows", "rank"), [(1, 0), (1, 416), (4, 416)])
@pytest.mark.parametrize(
    ("N", "K"), [(22016, 4096), (4096, 11008), (12288, 4096), (4096, 4096)], ids=str
)
def test_programs_of_few_rows_all_read_ahead_at_once(N: int, K: int, rows: int, rank: int) -> None:
    """Layers of Llama 2 7B on an H100 or H200: 132 multiprocessors."""
    split = split_for(N, K, rows)
    kernel = compiled("sm_90", "2:4", rows, K, split, rank, K)
    opcodes = offline.sass(kernel).opcodes
    loads = [i for i, code in enumerate(opcodes) if offline.count((code,), "LDG.128")]
    products = [i for i, code in enumerate(opcodes) if offline.count((code,), "HMMA")]
    ahead = split.ahead * (3 * split.tiles + (0 if rows == 1 else 8))
    assert loads[ahead - 1] < products[0]  # or ptxas has put them behind
    count = -(-N // (16 * split.tiles * split.across))
    resident = 132 * offline.programs(kernel, split.warps * split.across)
    print(f"{N} x {K}, {rows} rows, rank {rank}: {count} programs, {resident} at once")
    assert count <= resident


def constants_of(where: str, rows: int) -> dict[str, int | str]:
    """Of a matrix of this kind."""
    nothing = torch.empty(0)
    return constants(Fragments(nothing, nothing, where, 16, 256, 256), rows)


@pytest.mark.parametrize(("target", "rows"), [("sm_90", 1), ("sm_90", 32), ("sm_80", 16)])
def test_the_loop_of_the_first_launch_exchanges_nothing(target: str, rows: int) -> None:
    nothing = torch.empty(0)
    given = constants(Fragments(nothing, nothing, "dense", 416, 32768, 128), rows)
    text = given.pop("TEXT0")
    del given["TEXT1"]
    given |= {"TEXT": text, "ROW": rows == 1, "RT": 1, "NW": 8, "AC": 1}
    given |= {"AHEAD": split_for_low(32768, rows).ahead}
    given |= {"EARLY": target == "sm_90"}
    aligned = ("RANK", "EACH")
    kernel = offline.compile(low_kernel, LOW_TYPES, given, target, warps=8, multiples=aligned)
    assert is_by_lane(kernel.asm["ttgir"], 8)
    code = offline.sass(kernel)
    assert code.spills == 0 and offline.count(code.loop_with("HMMA"), *offline.EXCHANGE) == 0
