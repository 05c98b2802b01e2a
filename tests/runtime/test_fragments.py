"""The lanes' layout holds the same numbers as the stored one, where tensor cores look for them."""

import pytest
import torch
from cpu_linears import matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from slimfx.runtime.fragments import (
    BLOCK,
    Fragments,
    dense_codes,
    dense_weight,
    fragments,
    stacked,
    why_not,
)
from slimfx.runtime.ops import linear_24, linear_int
from slimfx.runtime.pack import Packed24, PackedDense, PackedMatrix, pack_24, pack_codes, unpack_24
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

KINDS = [("dense", 2), ("dense", 3), ("dense", 4), ("2:4", 2), ("2:4", 3), ("2:4", 4)]


def dense(stored: PackedMatrix | Tensor, K: int) -> Tensor:
    """The weight [N, K] as the canonical ops read it, float64."""
    eye = torch.eye(K, dtype=torch.float64)
    if isinstance(stored, PackedDense):
        return linear_int(eye, stored.codes, stored.scale, stored.bits, stored.group).T
    assert isinstance(stored, Packed24)
    rest = (stored.scale, stored.bits, stored.group)
    return linear_24(eye, stored.values, stored.indices, *rest).T


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    N=st.integers(1, 40),
    fours=st.integers(1, 140),
    scales=st.sampled_from(["tensor", "row", "group"]),
    seed=st.integers(0, 99),
)
def test_the_layout_stands_for_the_stored_weight(
    kind: tuple[str, int], N: int, fours: int, scales: str, seed: int
) -> None:
    K = 4 * fours
    stored = matrix(kind, N, K, torch.Generator().manual_seed(seed), scales=scales)
    laid_out = fragments(stored, K)
    assert torch.equal(dense_weight(laid_out, torch.float64), dense(stored, K))


@pytest.mark.parametrize(("kind", "bits"), [(("2:4", 4), 3.0), (("dense", 4), 4.0)])
def test_the_layout_takes_no_more_room_than_the_file(kind: tuple[str, int], bits: float) -> None:
    N, K = 64, 512
    laid_out = fragments(matrix(kind, N, K, torch.Generator()), K)
    assert laid_out.data.numel() * 32 == bits * N * K
    assert laid_out.data.dtype is torch.int32 and laid_out.data.is_contiguous()


def test_padding_is_zero_codes_at_legal_positions() -> None:
    one = PackedDense(pack_codes(torch.ones(1, 4, dtype=torch.int8), 4), torch.ones(1, 1), 4, 4)
    for stored in (one, Packed24(*pack_24(torch.eye(4, dtype=torch.int8), 4), one.scale, 4, 4)):
        laid_out = fragments(stored, 4)
        N, K = 16, BLOCK[laid_out.where]
        whole = Fragments(laid_out.data, laid_out.scale, laid_out.where, N, K, 4)
        codes = dense_codes(whole)
        given = dense_codes(laid_out)
        assert torch.equal(codes[: given.shape[0], :4], given)
        assert codes.count_nonzero() == given.count_nonzero()
    positions = laid_out.data.unflatten(1, (3, 128))[:, 2]
    nibbles = (positions[..., None] >> torch.arange(0, 32, 4)) & 15
    assert ((nibbles & 3) < (nibbles >> 2)).all()


def test_a_word_holds_the_registers_of_a_lane() -> None:
    """By hand: lane 6 = 4 g + t of product 0 has rows 1 and 9, columns 4, 5, 12 and 13."""
    codes = torch.randint(-7, 8, (16, 64), dtype=torch.int8)
    stored = PackedDense(pack_codes(codes, 4), torch.ones(1, 1), 4, 64)
    word = int(fragments(stored, 64).data[0].view(32, 4)[6, 0]) & 0xFFFFFFFF
    wanted = [codes[r, c] for c in (4, 5) for r, c in ((1, c), (9, c), (1, c + 8), (9, c + 8))]
    assert [((word >> 4 * i) & 15) - 8 for i in range(8)] == [int(code) for code in wanted]


def test_positions_are_where_cutlass_has_them() -> None:
    """CUTLASS reads a word of metadata for each lane with `ldmatrix`, in the order of memory: 32
    rows, of which selector 0 takes the first 16, and 32 inputs.
    """
    order = torch.rand(32, 64, 4).argsort(-1)
    codes = (torch.randint(1, 8, (32, 256)) * (order < 2).flatten(1)).to(torch.int8)
    values, indices = pack_24(codes, 4)
    stored = Packed24(values, indices, torch.ones(1, 1), 4, 256)
    assert torch.equal(unpack_24(values, indices, 4, 256), codes)
    _, meta = sparse_semi_structured_from_dense_cutlass(codes.to(torch.bfloat16))
    theirs = meta.contiguous().view(torch.int32).flatten().view(8, 32)  # [32 inputs, lane]
    ours = fragments(stored, 256).data.unflatten(1, (3, 128))[:, 2].view(2, 32, 4)
    lane = torch.arange(32)
    for product in range(8):
        word, selector = product // 2, product % 2
        for tile in (0, 1):
            theirs_lanes = lane[lane // 2 % 2 == tile]  # their selector says which 16 rows
            ours_lanes = lane[lane // 2 % 2 == selector]  # ours which of two products
            assert torch.equal(theirs[product][theirs_lanes], ours[tile, ours_lanes, word])


@pytest.mark.parametrize("kind", ["dense", "2:4"])
def test_matrices_are_put_below_each_other_in_whole_tiles(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [fragments(matrix((kind, 4), N, 72, draw, scales="group"), 72) for N in (32, 20, 5)]
    both = stacked(parts)
    assert both.N == 32 + 32 + 5
    rows = dense_weight(both, torch.float64)
    for start, part in zip((0, 32, 64), parts, strict=True):
        assert torch.equal(rows[start : start + part.N], dense_weight(part, torch.float64))
    other = fragments(matrix((kind, 4), 16, 76, draw), 76)
    with pytest.raises(AssertionError, match=f"stacked: {kind} of 76 inputs below {kind}"):
        stacked([parts[0], other])


def test_what_no_kernel_takes_is_said() -> None:
    draw = torch.Generator().manual_seed(0)
    assert why_not(torch.zeros(2, 2), 2) == "torch.float32 numbers, not 2:4 or dense codes"
    assert why_not(matrix(("bitmask", 4), 4, 8, draw), 8) == "a bitmask, not 2:4 or dense codes"
    assert why_not(matrix(("dense", 8), 4, 8, draw), 8) == "values of 8 bits, more than 4"
    assert why_not(matrix(("2:4", 16), 4, 8, draw), 8) == "values of 16 bits, more than 4"
    stored = matrix(("2:4", 4), 4, 64, draw, scales="group")
    assert isinstance(stored, Packed24) and why_not(stored, 64) is None
    odd = Packed24(stored.values, stored.indices, stored.scale, 4, 24)
    assert why_not(odd, 64) == "groups of 24 inputs, not a multiple of 32"
    same = Packed24(stored.values, torch.zeros_like(stored.indices), stored.scale, 4, 32)
    assert why_not(same, 64) == "positions of 2:4 values that do not ascend"
    with pytest.raises(AssertionError, match="do not ascend"):
        fragments(same, 64)
