"""2:4 weights of four bits on any GPU: the numbers, and the machine code for three of them."""

from __future__ import annotations

from typing import Any

import offline
import pytest
import torch
from cpu_linears import matrix
from slimfx.runtime.kernels import portable_24 as module
from slimfx.runtime.kernels.portable import How
from slimfx.runtime.kernels.portable_24 import packed_24, portable_24, words_24
from slimfx.runtime.ops import linear_24
from slimfx.runtime.pack import Packed24
from torch import Tensor

from slimfx.errors import SlimError

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-23}
"""Of a result, relative; sums in float32 add 2e-6 of all that is summed."""
CASES = {
    "one row, one group": (1, 5, 4, "row", torch.bfloat16, None),
    "one row, no bytes left over": (1, 64, 256, "tensor", torch.float32, 1),
    "three rows, odd outputs": (3, 67, 256, "tensor", torch.float16, 2),
    "inputs end within a byte": (16, 70, 260, "row", torch.bfloat16, 3),
    "groups that end within a block": (16, 33, 328, "group", torch.float32, 2),
    "seventeen rows": (17, 64, 132, "group", torch.bfloat16, 1),
    "sixty-four rows": (64, 130, 192, "row", torch.float16, 1),
}


def stored(N: int, K: int, scales: str) -> Packed24:
    """Random."""
    draw = torch.Generator().manual_seed(N * K)
    packed = matrix(("2:4", 4), N, K, draw, scales=scales)
    assert isinstance(packed, Packed24)
    return packed


def products(
    device: str, M: int, N: int, K: int, scales: str, dtype: torch.dtype, split: int | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """y by arithmetic, by permutation and, on a GPU, once more; in float64, and of magnitudes."""
    draw = torch.Generator().manual_seed(M)
    x = torch.randn(1, M, K, generator=draw).to(dtype)
    b = torch.randn(N, generator=draw).bfloat16()
    packed = stored(N, K, scales)
    weight = offline.to(device, words_24(packed, K))
    ways = [How(split, prmt) for prmt in (False, True, True)]
    there, bias = x.to(device), b.to(device)
    y = [portable_24(there, weight, bias, how=how).cpu() for how in ways]
    rest = (packed.values, packed.indices, packed.scale, 4, packed.group)
    wanted = linear_24(x.double(), *rest)
    dense = linear_24(torch.eye(K, dtype=torch.float64), *rest)  # [K, N]
    return y, wanted + b.double(), x.double().abs() @ dense.abs()


@pytest.mark.parametrize("name", CASES)
def test_it_multiplies(run: offline.Run, name: str) -> None:
    y, wanted, magnitude = run(products, *CASES[name])
    limit = wanted.abs() * ROUNDING[CASES[name][4]] + 2e-6 * magnitude
    assert y[0].dtype == CASES[name][4] and y[0].shape == wanted.shape
    assert ((y[0].double() - wanted).abs() <= limit).all()
    assert torch.equal(y[0], y[1]) and torch.equal(y[1], y[2])


@pytest.mark.parametrize("K", [4, 12, 128, 132, 640])
def test_the_layout_has_an_inverse(K: int) -> None:
    packed = stored(9, K, "row")
    weight = words_24(packed, K)
    back = packed_24(weight)
    assert torch.equal(back.values, packed.values) and torch.equal(back.indices, packed.indices)
    assert back.scale is packed.scale and (back.bits, back.group) == (4, packed.group)
    shared = weight.words.data_ptr() == packed.values.data_ptr()
    assert shared == (K % 128 == 0)


def test_bytes_that_begin_anywhere_are_copied() -> None:
    packed = stored(9, 128, "row")
    values = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.values.flatten()])[1:]
    weight = words_24(Packed24(values.view(9, 32), packed.indices, packed.scale, 4, 32), 128)
    assert weight.words.data_ptr() % 16 == 0
    assert torch.equal(packed_24(weight).values, packed.values)


def test_what_no_kernel_takes_is_refused() -> None:
    eight = matrix(("2:4", 8), 4, 16, torch.Generator())
    with pytest.raises(SlimError, match=r"takes codes of 4 bits, not 8; use expand\.prefill"):
        words_24(eight, 16)
    packed = stored(4, 96, "group")
    odd = Packed24(packed.values, packed.indices, packed.scale, 4, 24)
    with pytest.raises(SlimError, match="groups of 24 inputs, not a multiple of 16"):
        words_24(odd, 96)
    with pytest.raises(SlimError, match="positions of a group of four do not ascend"):
        words_24(Packed24(packed.values, packed.indices & 0xF3, packed.scale, 4, 32), 96)
    with pytest.raises(SlimError, match=r"\(4, 24\) for a weight \[4, 100\], not \[4, 25\]"):
        words_24(packed, 100)
    with pytest.raises(SlimError, match=r"scale \(4, 3\) for a weight \[4, 96\] in groups of 16"):
        words_24(Packed24(packed.values, packed.indices, packed.scale, 4, 16), 96)
    with pytest.raises(SlimError, match=r"x is torch.float64 \(1, 96\)"):
        portable_24(torch.zeros(1, 96).double(), words_24(packed, 96))
    with pytest.raises(SlimError, match=r"float16 or float32 \[..., 96\]"):
        portable_24(torch.zeros(1, 92), words_24(packed, 96))


def compiled(target: str, BM: int, GROUP: int) -> Any:
    """The kernel for bfloat16 x."""
    stored = {"words": "*i32", "places": "*i16"}
    return offline.portable(module.product_kernel, stored, target, BM=BM, GROUP=GROUP)


@pytest.mark.parametrize("BM", [16, 64])
def test_a_weight_takes_few_instructions_on_hopper(BM: int) -> None:
    code = offline.sass(compiled("sm_90", BM, 0))
    each = offline.per_weight(code, 64)
    print(f"sm_90, {BM} rows of x: {each:.2f} instructions a weight")
    # An H200 issues 6 of each weight of gate and up of Llama 2 7B in 18 microseconds; cuBLAS takes
    # 50 for 64 rows. 4.5 without x on its way: registers are copied while others are multiplied.
    assert each <= 6.0
    assert offline.count(code.loop, "HGMMA") == 8 and code.spills == 0
    # Four words in one load, their places in another; x on its way to shared memory for turns.
    kinds = ("LDG", "LDG.128", "LDG.64", "LDGSTS", "LDGSTS.128", "LDGDEPBAR")
    loads = [offline.count(code.loop, name) for name in kinds]
    x = BM // 8
    assert loads == [2 + x + 1, 1 + x, 1, x, x, 1]
    assert offline.count(code.opcodes, "DADD", "DMUL", "DFMA", "LDL", "STL") == 0


@pytest.mark.parametrize(("target", "product"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_groups_cost_no_more_than_a_scale(target: str, product: str) -> None:
    plain, grouped = (offline.sass(compiled(target, 16, group)) for group in (0, 128))
    assert offline.count(grouped.loop, product) == offline.count(plain.loop, product) > 0
    more = offline.per_weight(grouped, 64) - offline.per_weight(plain, 64)
    print(f"{target}: {offline.per_weight(plain, 64):.2f} and {more:.2f} more a weight")
    assert more < 0.6
    assert plain.spills == grouped.spills == 0


@pytest.mark.parametrize("group", [0, 32, 128])
def test_it_compiles_for_amd(group: int) -> None:
    assembly = compiled("gfx942", 16, group).asm["amdgcn"]
    assert "v_mfma_f32_16x16x16_bf16" in assembly
    assert ".vgpr_spill_count: 0" in assembly and "v_perm" in assembly
