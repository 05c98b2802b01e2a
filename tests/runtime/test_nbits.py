"""MatMulNBits' layout holds the numbers of the stored weight, in the fewest bytes it allows."""

import pytest
import torch
from cpu_linears import matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from slimfx.runtime.nbits import matmul_nbits, pack_nbits, why_not
from slimfx.runtime.ops import linear_24, linear_bitmask, linear_int
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedMatrix
from torch import Tensor

KINDS = [(where, bits) for where in ("dense", "2:4", "bitmask") for bits in (2, 3, 4, 8)]


def stored_linear(x: Tensor, stored: PackedMatrix) -> Tensor:
    """The product as the canonical ops define it."""
    rest = (stored.scale, stored.bits, stored.group)
    if isinstance(stored, PackedDense):
        return linear_int(x, stored.codes, *rest)  # type: ignore[arg-type]
    if isinstance(stored, Packed24):
        return linear_24(x, stored.values, stored.indices, *rest)
    assert isinstance(stored, PackedBitmask)
    return linear_bitmask(x, stored.values, stored.mask, *rest)


def product(x: Tensor, stored: PackedMatrix, level: int = 1) -> Tensor:
    packed = pack_nbits(stored, x.shape[-1])
    numbers = (x.shape[-1], len(packed.B), packed.bits, packed.block, level)
    return matmul_nbits(x, packed.B, packed.scales, *numbers)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    N=st.integers(1, 40),
    fours=st.integers(1, 40),
    scales=st.sampled_from(["tensor", "row", "group"]),
    seed=st.integers(0, 99),
)
def test_the_layout_stands_for_the_stored_weight(
    kind: tuple[str, int], N: int, fours: int, scales: str, seed: int
) -> None:
    K = 4 * fours
    stored = matrix(kind, N, K, torch.Generator().manual_seed(seed), scales=scales)
    eye = torch.eye(K, dtype=torch.float64)
    assert torch.equal(product(eye, stored), stored_linear(eye, stored))


@pytest.mark.parametrize(
    ("K", "group", "block"),
    [(256, 256, 128), (96, 96, 32), (64, 64, 64), (6, 6, 16), (192, 48, 16), (192, 96, 32)],
)
def test_blocks_take_the_fewest_bytes_that_the_groups_allow(K: int, group: int, block: int) -> None:
    scale = torch.ones(3, -(-K // group), dtype=torch.bfloat16)
    zeros = torch.full((3, K // 2), 0x88, dtype=torch.uint8)
    packed = pack_nbits(PackedDense(zeros, scale, 4, group), K)
    assert packed.block == block
    assert packed.B.shape == (3, -(-K // block), block // 2)
    assert packed.scales.shape == (3 * -(-K // block),)


def test_groups_that_no_block_divides_are_named() -> None:
    codes = torch.zeros(3, 24, dtype=torch.uint8)
    grouped = PackedDense(codes, torch.ones(3, 6, dtype=torch.bfloat16), 4, 8)
    assert why_not(grouped) == "groups of 8 inputs, not a multiple of 16"
    assert why_not(PackedDense(codes, torch.ones(3, 1, dtype=torch.bfloat16), 4, 8)) is None


def test_level_4_rounds_each_row_and_block_to_eight_bits() -> None:
    stored = matrix(("dense", 4), 8, 64, torch.Generator().manual_seed(0), scales="group")
    block = pack_nbits(stored, 64).block
    x = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 1.0])[:, None]
    step = x.unflatten(1, (-1, block)).abs().amax(-1, keepdim=True) / 127
    bound = (step / 2).expand(-1, -1, block).flatten(1) @ stored_linear(torch.eye(64), stored).abs()
    error = (product(x, stored, 4) - product(x, stored)).abs()
    assert (error <= bound * 1.001 + 1e-6).all()
    assert (error[:3].amax(1) > 1e-3 * bound[:3].amax(1)).all()


def test_other_tensors_are_refused() -> None:
    packed = pack_nbits(matrix(("dense", 4), 8, 64, torch.Generator(), scales="row"), 64)
    numbers = (64, 8, 4, packed.block, 1)
    with pytest.raises(RuntimeError, match="x ends in 32, not 64"):
        matmul_nbits(torch.zeros(2, 32), packed.B, packed.scales, *numbers)
    with pytest.raises(RuntimeError, match=r"scales .* for"):
        matmul_nbits(torch.zeros(2, 64), packed.B, packed.scales[1:], *numbers)
    with pytest.raises(RuntimeError, match="accuracy 2"):
        matmul_nbits(torch.zeros(2, 64), packed.B, packed.scales, *numbers[:4], 2)


@pytest.mark.parametrize("level", [1, 4])
def test_opcheck(level: int) -> None:
    stored = matrix(("dense", 4), 20, 64, torch.Generator().manual_seed(0), scales="group")
    packed = pack_nbits(stored, 64)
    numbers = (64, 20, packed.bits, packed.block, level)
    op = torch.ops.slimfx.matmul_nbits.default
    torch.library.opcheck(op, (torch.randn(3, 64), packed.B, packed.scales, *numbers))
