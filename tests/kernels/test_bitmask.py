"""Sparse weights of any pattern on any GPU: the numbers, and the machine code for three of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import offline
import pytest
import torch
from cpu_linears import matrix
from slimfx.runtime.kernels import bitmask as module
from slimfx.runtime.kernels.bitmask import bitmask, bits_of, packed_bits
from slimfx.runtime.kernels.portable import How
from slimfx.runtime.ops import linear_bitmask
from slimfx.runtime.pack import PackedBitmask, pack_bitmask
from torch import Tensor

from slimfx.errors import SlimError

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-23}
"""Of a result, relative; sums in float32 add 2e-6 of all that is summed."""
CASES = {
    "one row, one input": (4, 1, 1, 1, "tensor", torch.bfloat16, None),
    "two bits": (2, 3, 70, 130, "row", torch.float16, 2),
    "three bits, which lie in two bytes": (3, 16, 40, 256, "tensor", torch.bfloat16, 1),
    "four bits in groups": (4, 3, 33, 200, "group", torch.float32, 3),
    "four bits, seventeen rows": (4, 17, 130, 264, "row", torch.bfloat16, 1),
    "eight bits": (8, 16, 64, 300, "row", torch.float32, 2),
    "no codes": (16, 64, 40, 136, "tensor", torch.float16, 1),
}


def stored(bits: int, N: int, K: int, scales: str) -> PackedBitmask:
    """Random, half of it zero."""
    packed = matrix(("bitmask", bits), N, K, torch.Generator().manual_seed(N * K), scales=scales)
    assert isinstance(packed, PackedBitmask)
    return packed


def products(
    device: str,
    bits: int,
    M: int,
    N: int,
    K: int,
    scales: str,
    dtype: torch.dtype,
    split: int | None,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """y; in float64; of magnitudes; and whether a second run gave the same bits."""
    draw = torch.Generator().manual_seed(M)
    x = torch.randn(1, M, K, generator=draw).to(dtype)
    b = torch.randn(N, generator=draw).bfloat16()
    packed = stored(bits, N, K, scales)
    weight = offline.to(device, bits_of(packed, K))
    there, bias = x.to(device), b.to(device)
    y, again = (bitmask(there, weight, bias, how=How(split)) for _ in "12")
    rest = (packed.values, packed.mask, packed.scale, bits, packed.group)
    wanted = linear_bitmask(x.double(), *rest)
    dense = linear_bitmask(torch.eye(K, dtype=torch.float64), *rest)  # [K, N]
    magnitude = x.double().abs() @ dense.abs()
    return y.cpu(), wanted + b.double(), magnitude, torch.equal(y, again)


@pytest.mark.parametrize("name", CASES)
def test_it_multiplies(run: offline.Run, name: str) -> None:
    y, wanted, magnitude, same = run(products, *CASES[name])
    bits, *_, dtype, _ = CASES[name]
    # bfloat16 values become float16 for such an x: 2^-24 is the least of these.
    slack = 2e-6 if bits < 16 else 1e-4
    limit = wanted.abs() * ROUNDING[dtype] + slack * magnitude
    assert y.dtype == dtype and y.shape == wanted.shape
    assert ((y.double() - wanted).abs() <= limit).all()
    assert same


def extremes(device: str) -> tuple[Tensor, Tensor]:
    """Rows of which nothing stays, everything does, or the first and last input only."""
    codes = torch.arange(-7, 8, dtype=torch.int8).repeat(18)[:256].repeat(4, 1)
    stays = torch.zeros(4, 256, dtype=torch.bool)
    stays[1] = True
    stays[3, [0, 255]] = True
    values, mask = pack_bitmask(codes * stays, stays, 4)
    packed = PackedBitmask(values, mask, torch.ones(1, 1).bfloat16(), 4, 256)
    y = bitmask(torch.eye(256, device=device), offline.to(device, bits_of(packed, 256)))
    return y.cpu(), (codes * stays).T.float()


def test_rows_may_be_empty_or_full(run: offline.Run) -> None:
    y, wanted = run(extremes)
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("K", [1, 37, 128, 200])
def test_the_layout_has_an_inverse(bits: int, K: int) -> None:
    packed = stored(bits, 9, K, "row")
    back = packed_bits(bits_of(packed, K))
    assert torch.equal(back.values, packed.values) and torch.equal(back.mask, packed.mask)
    assert back.scale is packed.scale and (back.bits, back.group) == (bits, packed.group)


def test_places_are_counted() -> None:
    packed = stored(4, 5, 300, "tensor")
    weight = bits_of(packed, 300)
    stays = torch.zeros(5, 384, dtype=torch.bool)
    eye = torch.eye(300, dtype=torch.float64)
    ones = PackedBitmask(torch.full_like(packed.values, 0x99), packed.mask, packed.scale, 4, 32)
    stays[:, :300] = linear_bitmask(eye, ones.values, ones.mask, ones.scale, 4, 32).T != 0
    for row in range(5):
        assert weight.rows[row] == stays[:row].sum()
        for block in range(3):
            assert weight.blocks[row, block] == stays[row, : 128 * block].sum()


def test_a_mask_of_more_values_than_there_are_is_refused() -> None:
    packed = stored(4, 4, 96, "row")
    few = replace(packed, values=packed.values[:-1])
    with pytest.raises(SlimError, match=r"bitmask: \d+ values stay and \d+ are stored"):
        bits_of(few, 96)
    with pytest.raises(SlimError, match=r"\(4, 12\) for a weight \[4, 97\], not \[4, 13\]"):
        bits_of(packed, 97)


def test_groups_that_end_within_a_product_are_refused() -> None:
    packed = replace(stored(4, 4, 96, "group"), scale=torch.ones(4, 2).bfloat16(), group=48)
    with pytest.raises(SlimError, match="bitmask: groups of 48 inputs, not a multiple of 32"):
        bitmask(torch.zeros(1, 96), bits_of(packed, 96))


def compiled(target: str, bits: int, GROUP: int) -> Any:
    """The kernel for up to 16 rows of a bfloat16 x."""
    values = "*bf16" if bits == 16 else "*i32"
    stored = {"values": values, "mask": "*i32", "rows": "*i64", "blocks": "*i32"}
    own = {"BM": 16, "GROUP": GROUP, "BITS": bits, "PRMT": False}
    return offline.portable(module.product_kernel, stored, target, **own)


@pytest.mark.parametrize(
    ("target", "bits", "limit"), [("sm_80", 4, 19.5), ("sm_90", 4, 17.7), ("sm_90", 16, 17.7)]
)
def test_a_weight_takes_no_more_time_than_a_dense_one(target: str, bits: int, limit: float) -> None:
    """The limit is what a GPU can issue while it reads the two bytes of a bfloat16 weight: 108 SMs
    x 128 x 1.41 GHz at 2.0 TB/s (A100), 132 x 128 x 1.755 GHz at 3.35 TB/s (H100).
    """
    code = offline.sass(compiled(target, bits, 0))
    each = offline.per_weight(code, 64)
    print(f"{target}, {bits} bits: {each:.2f} instructions a weight")
    assert each <= limit and code.spills == 0
    assert offline.count(code.opcodes, "DADD", "DMUL", "DFMA") == 0
    assert offline.count(code.loop, "HGMMA" if target == "sm_90" else "HMMA") > 0


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 32), (16, 0)])
def test_it_compiles_for_amd(bits: int, group: int) -> None:
    assembly = compiled("gfx942", bits, group).asm["amdgcn"]
    assert "v_mfma_f32_16x16x16_bf16" in assembly
    assert ".vgpr_spill_count: 0" in assembly
