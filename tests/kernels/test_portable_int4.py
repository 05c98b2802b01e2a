"""Dense weights of four-bit codes on any GPU: the numbers, and the machine code for three."""

from __future__ import annotations

from typing import Any

import offline
import pytest
import torch
from cpu_linears import matrix
from slimfx.runtime.kernels import portable_int4 as module
from slimfx.runtime.kernels.portable import How
from slimfx.runtime.kernels.portable_int4 import Words4, packed_4, portable_int4, words_4
from slimfx.runtime.ops import linear_int
from slimfx.runtime.pack import PackedDense
from torch import Tensor

from slimfx.errors import SlimError

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-23}
"""Of a result, relative; sums in float32 add 2e-6 of all that is summed."""
CASES = {
    "one row, one input": (1, 5, 1, "row", 32, torch.bfloat16, None),
    "a rank of 37": (3, 67, 37, "group", 128, torch.bfloat16, 1),
    "groups of 128": (16, 70, 260, "group", 128, torch.float16, 2),
    "groups of 96": (3, 33, 328, "group", 96, torch.float32, 3),
    "groups of 32": (17, 64, 130, "group", 32, torch.bfloat16, 1),
    "groups of all": (16, 64, 384, "tensor", 384, torch.float32, 2),
    "sixty-four rows": (64, 130, 192, "group", 192, torch.float16, 1),
}


def stored(N: int, K: int, scales: str, group: int) -> PackedDense:
    """Random."""
    draw = torch.Generator().manual_seed(N * K)
    packed = matrix(("dense", 4), N, K, draw, scales=scales)
    assert isinstance(packed, PackedDense)
    if scales != "group":
        return packed
    scale = (torch.rand(N, -(-K // group), generator=draw) + 0.5).bfloat16()
    return PackedDense(packed.codes, scale, 4, group)


def products(
    device: str,
    M: int,
    N: int,
    K: int,
    scales: str,
    group: int,
    dtype: torch.dtype,
    split: int | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """y by arithmetic, by permutation and, on a GPU, once more; in float64, and of magnitudes."""
    draw = torch.Generator().manual_seed(M)
    x = torch.randn(1, M, K, generator=draw).to(dtype)
    b = torch.randn(N, generator=draw).bfloat16()
    packed = stored(N, K, scales, group)
    laid_out = words_4(packed, K)
    weight = Words4(laid_out.words.to(device), packed.scale.to(device), K, packed.group)
    ways = [How(split, prmt) for prmt in (False, True, True)]
    there, bias = x.to(device), b.to(device)
    y = [portable_int4(there, weight, bias, how=how).cpu() for how in ways]
    rest = (packed.codes, packed.scale, 4, packed.group)
    wanted = linear_int(x.double(), *rest)
    dense = linear_int(torch.eye(K, dtype=torch.float64), *rest)  # [K, N]
    return y, wanted + b.double(), x.double().abs() @ dense.abs()


@pytest.mark.parametrize("name", CASES)
def test_it_multiplies(run: offline.Run, name: str) -> None:
    y, wanted, magnitude = run(products, *CASES[name])
    limit = wanted.abs() * ROUNDING[CASES[name][5]] + 2e-6 * magnitude
    assert y[0].dtype == CASES[name][5] and y[0].shape == wanted.shape
    assert ((y[0].double() - wanted).abs() <= limit).all()
    assert torch.equal(y[0], y[1]) and torch.equal(y[1], y[2])


def empty(device: str) -> Tensor:
    """y for no rows of x."""
    weight = words_4(stored(8, 16, "row", 32), 16)
    there = Words4(weight.words.to(device), weight.scale.to(device), 16, 32)
    return portable_int4(torch.zeros(2, 0, 16, device=device), there).cpu()


def test_no_rows_give_none(run: offline.Run) -> None:
    assert run(empty).shape == (2, 0, 8)


@pytest.mark.parametrize("K", [1, 37, 128, 130])
def test_the_layout_has_an_inverse(K: int) -> None:
    packed = stored(9, K, "row", 32)
    weight = words_4(packed, K)
    back = packed_4(weight)
    assert torch.equal(back.codes, packed.codes) and back.scale is packed.scale
    assert (back.bits, back.group) == (4, packed.group)
    assert (weight.words.data_ptr() == packed.codes.data_ptr()) == (K % 128 == 0)


def test_what_no_kernel_takes_is_refused() -> None:
    eight = matrix(("dense", 8), 4, 16, torch.Generator())
    with pytest.raises(SlimError, match="takes codes of 4 bits, not 8"):
        words_4(eight, 16)
    with pytest.raises(SlimError, match="groups of 24 inputs, not a multiple of 16"):
        words_4(stored(4, 96, "group", 24), 96)
    with pytest.raises(SlimError, match=r"x is torch.float32 \(1, 92\)"):
        portable_int4(torch.zeros(1, 92), words_4(stored(4, 96, "row", 32), 96))


def compiled(target: str, BM: int, GROUP: int) -> Any:
    """The kernel for bfloat16 x."""
    stored = {"words": "*i32"}
    return offline.portable(module.product_kernel, stored, target, BM=BM, GROUP=GROUP)


@pytest.mark.parametrize(
    ("target", "BM", "GROUP", "limit"),
    [("sm_90", 16, 128, 3.75), ("sm_90", 64, 128, 4.25), ("sm_80", 16, 128, 5.5)],
)
def test_a_weight_takes_few_instructions(target: str, BM: int, GROUP: int, limit: float) -> None:
    code = offline.sass(compiled(target, BM, GROUP))
    each = offline.per_weight(code, 64)
    print(f"{target}, {BM} rows of x, groups of {GROUP}: {each:.2f} instructions a weight")
    assert each <= limit and code.spills == 0
    assert offline.count(code.loop, "HGMMA" if target == "sm_90" else "HMMA") > 0
    # All but the scales come sixteen bytes at a time.
    kinds = ("LDG", "LDG.128", "LDG.U16", "LDGDEPBAR")
    loads = [offline.count(code.loop, name) for name in kinds]
    assert loads[1] >= 3 and loads[0] == sum(loads[1:])
    assert offline.count(code.opcodes, "DADD", "DMUL", "DFMA") == 0


@pytest.mark.parametrize("group", [0, 32, 128])
def test_it_compiles_for_amd(group: int) -> None:
    assembly = compiled("gfx942", 16, group).asm["amdgcn"]
    assert "v_mfma_f32_16x16x16_bf16" in assembly
    assert ".vgpr_spill_count: 0" in assembly
