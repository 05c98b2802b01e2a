"""Packed layouts: unpack undoes pack, the bytes are the documented ones, and none is wasted."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slimfx.runtime.pack import (
    FLOAT_BITS,
    Layout,
    Packed24,
    PackedBitmask,
    PackedDense,
    ascending,
    fits_24,
    pack_24,
    pack_bitmask,
    pack_bits,
    pack_codes,
    row_count,
    stored_values,
    unpack_24,
    unpack_bitmask,
    unpack_bits,
    unpack_codes,
)
from torch import Tensor

PAIRS = list(itertools.combinations(range(4), 2))
WIDTHS = (2, 3, 4, 8)
ALL_WIDTHS = (*WIDTHS, FLOAT_BITS)
FINITE = st.floats(-65536, 65536, width=32)
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def top(bits: int) -> int:
    """The largest code."""
    return 2 ** (bits - 1) - 1


def value(bits: int) -> st.SearchStrategy:
    """A code, or a number that bfloat16 rounds."""
    return FINITE if bits == FLOAT_BITS else st.integers(-top(bits), top(bits))


def matrix(flat: list, bits: int, N: int, K: int) -> Tensor:
    """[N, K] of int8 codes, or of bfloat16 values."""
    dtype = torch.bfloat16 if bits == FLOAT_BITS else torch.int8
    return torch.tensor(flat, dtype=dtype).reshape(N, K)


@st.composite
def dense(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Codes [N, K] of any width, K odd or even."""
    bits, N, K = draw(st.sampled_from(WIDTHS)), draw(st.integers(1, 4)), draw(st.integers(1, 19))
    flat = draw(st.lists(value(bits), min_size=N * K, max_size=N * K))
    return matrix(flat, bits, N, K), bits


@st.composite
def two_of_four(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Values [N, 4 G] with two, one or no non-zero in each four, G odd or even."""
    bits, N, G = draw(st.sampled_from(ALL_WIDTHS)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    cell = st.tuples(st.sampled_from(PAIRS), value(bits), value(bits))
    found = matrix([0] * N * G * 4, bits, N, 4 * G)
    for i, g in itertools.product(range(N), range(G)):
        (first, second), a, b = draw(cell)
        found[i, 4 * g + first], found[i, 4 * g + second] = a, b
    return found, bits


@st.composite
def masked(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Values [N, K] and a mask of any pattern around them, K odd or even."""
    bits = draw(st.sampled_from(ALL_WIDTHS))
    N, K = draw(st.integers(1, 4)), draw(st.integers(1, 19))
    flat = draw(st.lists(value(bits), min_size=N * K, max_size=N * K))
    stays = draw(st.lists(st.booleans(), min_size=N * K, max_size=N * K))
    mask = torch.tensor(stays).reshape(N, K)
    return matrix(flat, bits, N, K) * mask, mask, bits


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@EXAMPLES
@given(dense())
def test_unpacking_dense_codes_gives_them_back(case: tuple[Tensor, int]) -> None:
    codes, bits = case
    packed = pack_codes(codes, bits)
    again = unpack_codes(packed, bits, codes.shape[1])
    assert again.dtype == torch.int8
    assert torch.equal(again, codes)
    promised = Layout("dense", bits).bytes(*codes.shape, kept=0, scales=3)
    assert nbytes(packed) + 3 * 2 == promised


@EXAMPLES
@given(two_of_four())
def test_unpacking_a_24_matrix_gives_the_values_back(case: tuple[Tensor, int]) -> None:
    weight, bits = case
    N, K = weight.shape
    values, indices = pack_24(weight, bits)
    again = unpack_24(values, indices, bits, K)
    assert again.dtype == weight.dtype
    assert torch.equal(again, weight)
    promised = Layout("2:4", bits).bytes(N, K, kept=N * K // 2, scales=5)
    assert nbytes(values, indices) + (0 if bits == FLOAT_BITS else 5 * 2) == promised


@EXAMPLES
@given(masked())
def test_unpacking_a_bitmask_gives_the_values_back(case: tuple[Tensor, Tensor, int]) -> None:
    weight, mask, bits = case
    values, packed = pack_bitmask(weight, mask, bits)
    promised = Layout("bitmask", bits).bytes(*weight.shape, kept=int(mask.sum()), scales=7)
    assert nbytes(values, packed) + (0 if bits == FLOAT_BITS else 7 * 2) == promised
    assert torch.equal(unpack_bits(packed, weight.shape[1]), mask)
    if mask.any():  # the op refuses a layer of which nothing stays, and so does the plan
        again = unpack_bitmask(values, packed, bits, weight.shape[1])
        assert again.dtype == weight.dtype
        assert torch.equal(again, weight)


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_every_possible_group_of_four_survives(bits: int) -> None:
    some = (-300.0, -0.125, 0.0, 1.5) if bits == FLOAT_BITS else range(-top(bits), top(bits) + 1)
    some = list(some)[:: max(1, len(some) // 20)]
    groups = []
    for (first, second), a, b in itertools.product(PAIRS, some, some):
        group = [0.0, 0.0, 0.0, 0.0]
        group[first], group[second] = a, b
        groups.append(group)
    weight = matrix(groups, bits, len(groups), 4)
    assert torch.equal(unpack_24(*pack_24(weight, bits), bits, 4), weight)
    wide = weight.reshape(1, -1)
    assert torch.equal(unpack_24(*pack_24(wide, bits), bits, wide.shape[1]), wide)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place_of_a_word_survives(bits: int) -> None:
    codes = torch.arange(-top(bits), top(bits) + 1, dtype=torch.int8)
    rows = torch.stack([codes.roll(shift) for shift in range(9)])
    assert torch.equal(unpack_codes(pack_codes(rows, bits), bits, len(codes)), rows)


def test_the_dense_bytes_are_the_documented_ones() -> None:
    def packed(codes: list[int], bits: int) -> list[list[int]]:
        return pack_codes(torch.tensor([codes], dtype=torch.int8), bits).tolist()

    assert packed([-7, 7, 0], 4) == [[1 | 15 << 4, 8 | 8 << 4]]  # code + 8, low nibble first
    assert packed([-127, 0, 127], 8) == [[1, 128, 255]]
    assert packed([-1, 0, 1, 1, -1], 2) == [[1 | 2 << 2 | 3 << 4 | 3 << 6, 1 | 0b10101000]]
    word = 1 | 7 << 3 | 4 << 6 | 5 << 9  # 12 bits, then codes of zero
    assert packed([-3, 3, 0, 1], 3) == [[word & 255, word >> 8 | 4 << 4 & 255]]


def test_the_sparse_bytes_are_the_documented_ones() -> None:
    codes = torch.tensor([[0, 3, 0, -7, 5, 0, 0, 0, 0, 0, 1, 2]], dtype=torch.int8)
    values, indices = pack_24(codes, 4)
    # code + 8, low nibble first: (3, -7), (5, 0), (1, 2)
    assert values.tolist() == [[11 | 1 << 4, 13 | 8 << 4, 9 | 10 << 4]]
    # positions (1, 3) and (0, 1), then (2, 3) and nothing
    assert indices.tolist() == [[1 | 3 << 2 | 0 << 4 | 1 << 6, 2 | 3 << 2]]
    values, indices = pack_24(codes.bfloat16(), FLOAT_BITS)
    assert values.dtype is torch.bfloat16
    assert values.tolist() == [[3, -7, 5, 0, 1, 2]]


def test_the_bytes_of_a_bitmask_are_the_documented_ones() -> None:
    codes = torch.tensor([[0, 3, 0, -7, 5, 0, 0, 0, 0, 1], [0] * 10], dtype=torch.int8)
    mask = codes != 0
    mask[1, 2] = True  # a zero that stays, in the next row
    values, packed = pack_bitmask(codes, mask, 4)
    assert packed.tolist() == [[0b00011010, 0b10], [0b100, 0]]
    assert values.tolist() == [11 | 1 << 4, 13 | 9 << 4, 8 | 8 << 4]
    floats, _ = pack_bitmask(codes.bfloat16(), mask, FLOAT_BITS)
    assert floats.tolist() == [3, -7, 5, 1, 0]


def test_the_zeros_of_a_group_with_fewer_codes_take_the_lowest_free_positions() -> None:
    _, indices = pack_24(torch.tensor([[0, 0, 0, 4, 0, 0, 0, 0]], dtype=torch.int8), 4)
    assert indices.tolist() == [[0 | 3 << 2 | 0 << 4 | 1 << 6]]
    _, indices = pack_24(torch.tensor([[4, 0, 0, 0]], dtype=torch.int8), 4)
    assert indices.tolist() == [[0 | 1 << 2]]


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_what_is_stored_is_contiguous(bits: int) -> None:
    zeros = torch.zeros(8, 12, dtype=torch.bfloat16 if bits == FLOAT_BITS else torch.int8)
    for view in (zeros, zeros[::2], zeros.T.contiguous().T):
        mask = torch.ones_like(view, dtype=torch.bool)
        stored = [*pack_24(view, bits), *pack_bitmask(view, mask, bits)]
        if bits != FLOAT_BITS:
            stored.append(pack_codes(view, bits))
        for packed in stored:
            assert packed.dtype in (torch.uint8, view.dtype)
            assert packed.dtype is not torch.int8
            assert packed.is_contiguous()


def test_float_values_are_rounded_to_bfloat16_and_nothing_else() -> None:
    weight = torch.randn(4, 16)
    expected = weight.bfloat16()
    weight.view(4, 4, 4)[..., ::2] = 0
    values, _ = pack_24(weight, FLOAT_BITS)
    kept = expected.view(4, 4, 4)[..., 1::2].flatten(1)
    assert torch.equal(values, kept)


@pytest.mark.parametrize("full", [3, 4])
@pytest.mark.parametrize("where", [0, 5])
@pytest.mark.parametrize("bits", [2, 4, FLOAT_BITS])
def test_a_group_with_more_than_two_values_is_refused(full: int, where: int, bits: int) -> None:
    weight = torch.zeros(6, 8, dtype=torch.bfloat16 if bits == FLOAT_BITS else torch.int8)
    weight[where, 4 : 4 + full] = torch.tensor([1, -1, 1, -1], dtype=weight.dtype)[:full]
    with pytest.raises(AssertionError, match="more than two"):
        pack_24(weight, bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_code_beyond_the_layout_is_refused_by_every_layout(bits: int, sign: int) -> None:
    last = top(bits) if sign > 0 else top(bits) + 1
    for beyond in {last + 1, 100, 127, 128} - set(range(last + 1)):
        if not -128 <= sign * beyond <= 127:
            continue
        codes = torch.zeros(3, 8, dtype=torch.int8)
        codes[1, 5] = sign * beyond
        with pytest.raises(AssertionError, match="pack_codes"):
            pack_codes(codes, bits)
        with pytest.raises(AssertionError, match="pack_codes"):
            pack_24(codes, bits)
        with pytest.raises(AssertionError, match="pack_codes"):
            pack_bitmask(codes, codes != 0, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_least_code_that_other_libraries_make_is_kept(bits: int) -> None:
    codes = torch.tensor([[-top(bits) - 1, 0, 1, 0, 0, 0, 0, -1]], dtype=torch.int8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 8), codes)
    assert torch.equal(unpack_24(*pack_24(codes, bits), bits, 8), codes)


@pytest.mark.parametrize("bits", [4, FLOAT_BITS])
def test_a_value_that_the_mask_leaves_out_is_refused(bits: int) -> None:
    weight = torch.ones(3, 8, dtype=torch.bfloat16 if bits == FLOAT_BITS else torch.int8)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[2, 1] = False
    with pytest.raises(AssertionError, match="outside the mask"):
        pack_bitmask(weight, mask, bits)


def test_a_width_that_is_no_multiple_of_four_is_refused() -> None:
    with pytest.raises(RuntimeError):
        pack_24(torch.zeros(2, 6, dtype=torch.int8), 4)


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_packing_and_unpacking_leave_their_arguments_as_they_were(bits: int) -> None:
    weight = torch.tensor([[0, 1, 0, -1]])
    weight = weight.to(torch.bfloat16 if bits == FLOAT_BITS else torch.int8)
    mask = weight != 0
    before = weight.clone(), mask.clone()
    sparse, masked = pack_24(weight, bits), pack_bitmask(weight, mask, bits)
    copies = [t.clone() for t in (*sparse, *masked)]
    unpack_24(*sparse, bits, 4)
    unpack_bitmask(*masked, bits, 4)
    if bits != FLOAT_BITS:
        pack_codes(weight, bits)
    assert torch.equal(weight, before[0]) and torch.equal(mask, before[1])
    assert all(torch.equal(a, b) for a, b in zip((*sparse, *masked), copies, strict=True))


# A file may hold any bytes: the result is then some matrix of the right form, never a crash.


@EXAMPLES
@given(st.data(), st.sampled_from(WIDTHS), st.integers(1, 3), st.integers(1, 5))
def test_any_bytes_unpack_to_codes_of_a_24_matrix(data: st.DataObject, bits, N, G) -> None:
    width = math.ceil(2 * G * bits / 8)
    values = data.draw(st.binary(min_size=N * width, max_size=N * width))
    indices = data.draw(st.binary(min_size=N * ((G + 1) // 2), max_size=N * ((G + 1) // 2)))
    found = unpack_24(as_bytes(values, N), as_bytes(indices, N), bits, 4 * G)
    assert found.dtype == torch.int8
    assert found.shape == (N, 4 * G)
    assert (found.unflatten(1, (-1, 4)) != 0).sum(-1).max() <= 2
    # two values may claim one place; then their sum is there, in eight bits
    assert -(2**bits) <= found.min().item() <= found.max().item() <= 2**bits


@EXAMPLES
@given(st.data(), st.sampled_from(ALL_WIDTHS), st.integers(1, 3), st.integers(1, 17))
def test_any_mask_unpacks_whatever_the_number_of_values(data: st.DataObject, bits, N, K) -> None:
    width = math.ceil(K / 8)
    mask = as_bytes(data.draw(st.binary(min_size=N * width, max_size=N * width)), N)
    held = data.draw(st.binary(min_size=1, max_size=6))
    values = as_bytes(held, 1)[0]
    if bits == FLOAT_BITS:
        values = values.float().bfloat16()
    found = unpack_bitmask(values, mask, bits, K)
    assert found.shape == (N, K)
    assert not found[~unpack_bits(mask, K)].any()
    expected = values if bits == FLOAT_BITS else unpack_codes(values[None], bits, 8 * len(held))[0]
    assert set(found.flatten().tolist()) <= {0, *expected.tolist()}


def as_bytes(data: bytes, N: int) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(N, -1)


@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_the_names_are_those_that_tables_show(bits: int) -> None:
    shown = "bf16" if bits == FLOAT_BITS else f"int{bits}"
    assert Layout("dense", bits).name == shown
    assert Layout("2:4", bits).name == f"2:4 {shown}"
    assert Layout("bitmask", bits).name == f"bitmask {shown}"


def test_the_bits_a_weight_of_each_layout_are_the_documented_ones() -> None:
    N, K = 64, 128

    def bits_a_weight(where: str, bits: int) -> float:
        return 8 * Layout(where, bits).bytes(N, K, kept=N * K // 2, scales=0) / (N * K)

    assert [bits_a_weight("dense", bits) for bits in WIDTHS] == [2, 3, 4, 8]
    assert [bits_a_weight("2:4", bits) for bits in ALL_WIDTHS] == [2, 2.5, 3, 5, 9]
    assert [bits_a_weight("bitmask", bits) for bits in ALL_WIDTHS] == [2, 2.5, 3, 5, 9]


def test_bfloat16_values_count_no_scale() -> None:
    for where in ("2:4", "bitmask"):
        without, with_scales = (
            Layout(where, FLOAT_BITS).bytes(8, 16, kept=64, scales=scales) for scales in (0, 9)
        )
        assert without == with_scales


def test_bits_are_packed_lowest_first_with_a_ragged_last_byte() -> None:
    mask = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0, 0]]).bool()
    assert pack_bits(mask).tolist() == [[0b10000001, 1], [0b10, 0]]
    assert torch.equal(unpack_bits(pack_bits(mask), 9), mask)


def most_in_a_four(n: int, m: int) -> int:
    """The most weights that an n:m mask can leave in an aligned four, by trying all masks."""
    width = math.lcm(m, 4)
    choices = itertools.product(itertools.combinations(range(m), n), repeat=width // m)
    most = 0
    for choice in choices:
        kept = [start * m + j for start, group in enumerate(choice) for j in group]
        fours = [j // 4 for j in kept]
        most = max(most, *(fours.count(four) for four in range(width // 4)))
    return most


SMALL = [(n, m) for m in (2, 3, 4, 5, 6, 8, 12) for n in range(1, m) if m < 12 or n <= 3]


@pytest.mark.parametrize(("n", "m"), SMALL)
def test_no_mask_that_is_said_to_fit_leaves_more_than_two_in_a_four(n: int, m: int) -> None:
    assert not fits_24(n, m) or most_in_a_four(n, m) <= 2


@pytest.mark.parametrize(("n", "m"), SMALL)
def test_every_sparsity_whose_masks_all_leave_two_in_a_four_is_said_to_fit(n: int, m: int) -> None:
    assert fits_24(n, m) or most_in_a_four(n, m) > 2


def test_indices_ascend_as_packed_and_not_once_one_group_is_turned() -> None:
    _, indices = pack_24(torch.tensor([[0, 1, 0, 1] * 3] * 3, dtype=torch.int8), 4)
    assert ascending(indices, 12)
    for row, byte, group in ((0, 0, 0), (2, 0, 1), (1, 1, 0)):
        for turned in (1 | 1 << 2, 3 | 1 << 2):  # equal, descending
            changed = indices.clone()
            changed[row, byte] &= 0xFF ^ (15 << 4 * group)
            changed[row, byte] |= turned << 4 * group
            assert not ascending(changed, 12)
    padded = indices.clone()
    padded[:, 1] |= 5 << 4  # behind the width, where no weight is
    assert ascending(padded, 12)


def test_the_rows_of_a_matrix_are_counted_in_any_layout() -> None:
    W, scale = torch.eye(3, 8, dtype=torch.int8), torch.ones(1, 1, dtype=torch.bfloat16)
    assert row_count(W) == 3
    for matrix in (
        PackedDense(pack_codes(W, 4), scale, 4, 8),
        Packed24(*pack_24(W, 4), scale, 4, 8),
        PackedBitmask(*pack_bitmask(W, W != 0, 4), scale, 4, 8),
    ):
        assert row_count(matrix) == 3
        assert torch.equal(stored_values(matrix, 8), W)
