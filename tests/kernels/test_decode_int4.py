"""A dense weight of four bits on tensor cores: the numbers, and the machine code."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import offline
import pytest
import torch
from cpu_linears import matrix
from slimfx.runtime.fragments import Fragments, dense_weight, fragments
from slimfx.runtime.kernels.decode_int4 import decode_int4, decode_int4_kernel
from slimfx.runtime.kernels.launch import check_layout, pairs, why_not_on
from slimfx.runtime.kernels.mma import Split, constants, split_for
from slimfx.runtime.kernels.warp import is_by_lane
from slimfx.runtime.pack import PackedDense
from torch import Tensor

from slimfx.errors import SlimError

ROUNDING = 2**-8
"""Of a bfloat16 result, relative; float32 sums add far less."""
TYPES = {
    **{"x": "*i32", "XS": "i32", "M": "i32", "words": "*i32", "scales": "*i32"},
    **{"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "N": "i32"},
    **{"EACH": "i32", "STEP": "i32"},
}


def weight(N: int, K: int, scales: str, group: int = 32) -> Fragments:
    """Random, laid out; `scales` as in `cpu_linears.matrix`."""
    draw = torch.Generator().manual_seed(N * K)
    stored = matrix(("dense", 4), N, K, draw, scales=scales)
    assert isinstance(stored, PackedDense)
    if scales == "group":
        scale = stored.scale[:, :: group // 32]
        stored = PackedDense(stored.codes, scale.contiguous(), 4, group)
    return fragments(stored, K)


def to(device: str, matrix: Fragments) -> Fragments:
    """The same on a device."""
    return replace(matrix, data=matrix.data.to(device), scale=matrix.scale.to(device))


def product(
    device: str, M: int, N: int, K: int, scales: str, group: int, split: Split, bias: bool
) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and the same in float64."""
    draw = torch.Generator().manual_seed(M)
    x = torch.randn(M, K, generator=draw).bfloat16()
    b = torch.randn(N, generator=draw).bfloat16() if bias else None
    W = weight(N, K, scales, group)
    there = None if b is None else b.to(device)
    y = decode_int4(x.to(device), to(device, W), bias=there, split=split).cpu()
    return y, x.double() @ dense_weight(W, torch.float64).T + (0 if b is None else b.double())


CASES = {
    "one row": (1, 16, 256, "tensor", 32, Split(1, 1)),
    "two tiles, two warps, odd rows": (3, 35, 520, "row", 32, Split(2, 2)),
    "groups of 32": (8, 16, 320, "group", 32, Split(1, 2)),
    "groups of 64": (2, 20, 512, "group", 64, Split(1, 1)),
    "groups of 128, shared inputs": (3, 24, 1024, "group", 128, Split(2, 2, 2)),
    "groups of 192": (1, 16, 384, "group", 192, Split(1, 1)),
    "nine rows, groups of 256": (9, 16, 768, "group", 256, Split(1, 1)),
    "sixteen rows, groups of 32": (16, 40, 256, "group", 32, Split(2, 1)),
    "four tiles": (1, 70, 512, "tensor", 32, Split(4, 2)),
    "few inputs": (5, 7, 37, "row", 32, Split(1, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_multiplies(run: offline.Run, name: str) -> None:
    y, wanted = run(product, *CASES[name], len(name) % 2 == 0)
    torch.testing.assert_close(y.double(), wanted, rtol=ROUNDING, atol=1e-4)


def test_two_runs_give_the_same_bits(run: offline.Run) -> None:
    one, two = (run(product, *CASES["groups of 128, shared inputs"], True)[0] for _ in "12")
    assert torch.equal(one, two)


def test_x_may_begin_anywhere() -> None:
    whole = torch.randn(3, 11).bfloat16()
    for x in (whole[:, 1:9], whole[:, :7], whole[1:, ::2], whole.T, whole[:1]):
        words = pairs(x)
        back = words.view(torch.bfloat16)
        assert torch.equal(back[:, : x.shape[1]], x) and not back[:, x.shape[1] :].any()


def test_what_it_would_misread_is_refused() -> None:
    W = weight(16, 64, "tensor")
    with pytest.raises(RuntimeError, match=r"x is torch.float32 \(2, 64\), not bfloat16"):
        decode_int4(torch.randn(2, 64), W)
    with pytest.raises(RuntimeError, match=r"not bfloat16 \[1 to 16, 64\]"):
        decode_int4(torch.randn(17, 64).bfloat16(), W)
    sparse = Fragments(W.data, W.scale, "2:4", 16, 64, 64)
    with pytest.raises(RuntimeError, match="the weight is 2:4 on cpu, not dense"):
        decode_int4(torch.randn(2, 64).bfloat16(), sparse)
    odd = torch.empty(W.data.numel() + 1, dtype=torch.int32)[1:].view_as(W.data)
    with pytest.raises(RuntimeError, match="begin at a multiple of 16 bytes"):
        decode_int4(torch.randn(2, 64).bfloat16(), Fragments(odd, W.scale, "dense", 16, 64, 64))


def test_without_triton_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "slimfx.runtime.kernels.warp")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SlimError, match=r"pip install 'slimfx\[triton\]'"):
        importlib.import_module("slimfx.runtime.kernels.warp")


def test_a_layout_that_the_assembly_does_not_take_is_refused() -> None:
    kernel = compiled("sm_90", 1, 32768, Split(2, 8))
    check_layout("decode_int4", kernel, 8)
    with pytest.raises(SlimError, match=r"laid its tensors out otherwise"):
        check_layout("decode_int4", kernel, 4)
    asm = {"ttgir": kernel.asm["ttgir"].replace("[32, 1]", "[8, 4]")}
    other = type("Compiled", (), {"asm": asm})
    with pytest.raises(SlimError, match=r"columns in one thread; use Triton 3.6"):
        check_layout("decode_int4", other, 8)


def test_gpus_without_the_instructions_are_left_to_other_kernels() -> None:
    assert why_not_on("cuda", 90) is None
    assert "gfx942 has no mma.sp" in str(why_not_on("hip", "gfx942"))
    assert "older than sm_80" in str(why_not_on("cuda", 75))


@pytest.mark.parametrize("two", [False, True])
def test_programs_take_all_inputs_and_fill_a_gpu(two: bool) -> None:
    for N in (16, 1024, 4096, 28672):
        for K in (128, 4096, 11008, 28672):
            split = split_for(N, K, two=two)
            assert split.warps * split.programs <= max(1, -(-K // 256)) * 2
            assert split.warps <= (8 if two else 16)
            assert split_for(N, K, two=two, alone=False).programs == 1


def compiled(target: str, rows: int, group: int, split: Split) -> object:
    """The kernel for [N, 32768], as a launch on such a GPU would have it."""
    nothing = torch.empty(0)
    given = constants(Fragments(nothing, nothing, "dense", 4096, 32768, group), rows)
    given |= {"RT": split.tiles, "NW": split.warps, "SK": split.programs}
    given |= {"PARTS": 0, "BIAS": False}
    return offline.compile(
        decode_int4_kernel, TYPES, given, target, warps=split.warps, multiples=("XS", "N")
    )


LIMITS = {
    # target, rows of x, group: instructions and INT of a weight
    ("sm_90", 1, 32768): (1.9, 1.0),
    ("sm_90", 1, 128): (2.1, 1.1),
    ("sm_90", 16, 128): (2.4, 1.1),
    ("sm_80", 1, 128): (2.1, 1.1),
}


@pytest.mark.parametrize(("target", "rows", "group"), LIMITS)
def test_the_loop_is_short(target: str, rows: int, group: int) -> None:
    split = Split(2, 8)
    kernel = compiled(target, rows, group, split)
    assert is_by_lane(kernel.asm["ttgir"], split.warps)
    code = offline.sass(kernel)
    weights = 256 * 16 * split.tiles // 32  # of a thread in a turn
    loop = code.loop_with("HMMA.16816")
    turns = offline.count(loop, "HMMA") // (16 * split.tiles * (2 if rows > 8 else 1))
    assert turns >= 1 and code.spills == 0
    assert offline.count(loop, *offline.EXCHANGE) == 0
    total = len(loop) / (turns * weights)
    integers = offline.count(loop, *offline.INT) / (turns * weights)
    name = f"{target}, {rows} rows, groups of {group}"
    print(f"{name}: {total:.2f} instructions a weight, INT {integers:.2f}")
    assert offline.count(loop, "LDG.128") == 4 * split.tiles * turns  # the weight's words
    assert total <= LIMITS[target, rows, group][0]
    assert integers <= LIMITS[target, rows, group][1]
