"""Packed layouts: unpack undoes pack, the bytes are the documented ones, and none is wasted."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slimfx.runtime.pack import (
    bytes_24,
    bytes_int4,
    fits_24,
    pack_24,
    pack_nibbles,
    unpack_24,
    unpack_nibbles,
)
from torch import Tensor

PAIRS = list(itertools.combinations(range(4), 2))


@st.composite
def sparse_codes(draw: st.DrawFn) -> Tensor:
    """Codes [N, 4 G] with two, one or no non-zero in each four, G odd or even."""
    N, G = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    code = st.integers(-7, 7)
    cell = st.tuples(st.sampled_from(PAIRS), code, code)
    codes = torch.zeros(N, G, 4, dtype=torch.int8)
    for i, g in itertools.product(range(N), range(G)):
        (first, second), a, b = draw(cell)
        codes[i, g, first], codes[i, g, second] = a, b
    return codes.reshape(N, 4 * G)


@st.composite
def dense_codes(draw: st.DrawFn) -> Tensor:
    """Any codes [N, K], K odd or even."""
    N, K = draw(st.integers(1, 4)), draw(st.integers(1, 11))
    flat = draw(st.lists(st.integers(-7, 7), min_size=N * K, max_size=N * K))
    return torch.tensor(flat, dtype=torch.int8).reshape(N, K)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(sparse_codes())
def test_unpacking_a_sparse_matrix_gives_the_codes_back(codes: Tensor) -> None:
    values, indices = pack_24(codes)
    again = unpack_24(values, indices)
    assert again.dtype == torch.int8
    assert torch.equal(again, codes)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(dense_codes())
def test_unpacking_a_dense_matrix_gives_the_codes_back(codes: Tensor) -> None:
    again = unpack_nibbles(pack_nibbles(codes), codes.shape[1])
    assert again.dtype == torch.int8
    assert torch.equal(again, codes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sparse_codes(), st.integers(1, 9))
def test_a_sparse_matrix_takes_the_bytes_that_were_promised(codes: Tensor, scales: int) -> None:
    N, K = codes.shape
    stored = [*pack_24(codes), torch.zeros(scales, dtype=torch.bfloat16)]
    assert sum(t.numel() * t.element_size() for t in stored) == bytes_24(N, K, scales)
    assert [tuple(t.shape) for t in stored[:2]] == [(N, K // 4), (N, math.ceil(K / 8))]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(dense_codes(), st.integers(1, 9))
def test_a_dense_matrix_takes_the_bytes_that_were_promised(codes: Tensor, scales: int) -> None:
    N, K = codes.shape
    stored = [pack_nibbles(codes), torch.zeros(scales, dtype=torch.bfloat16)]
    assert sum(t.numel() * t.element_size() for t in stored) == bytes_int4(N, K, scales)
    assert stored[0].shape == (N, math.ceil(K / 2))


def test_every_possible_group_of_four_survives() -> None:
    groups = []
    for (first, second), a, b in itertools.product(PAIRS, range(-7, 8), range(-7, 8)):
        group = [0, 0, 0, 0]
        group[first], group[second] = a, b
        groups.append(group)
    codes = torch.tensor(groups, dtype=torch.int8)  # [1350, 4]
    assert torch.equal(unpack_24(*pack_24(codes)), codes)
    wide = codes.reshape(1, -1)
    assert torch.equal(unpack_24(*pack_24(wide)), wide)


def test_the_sparse_bytes_are_the_documented_ones() -> None:
    codes = torch.tensor([[0, 3, 0, -7, 5, 0, 0, 0, 0, 0, 1, 2]], dtype=torch.int8)
    values, indices = pack_24(codes)
    # code + 8, low nibble first: (3, -7), (5, 0), (1, 2)
    assert values.tolist() == [[11 | 1 << 4, 13 | 8 << 4, 9 | 10 << 4]]
    # positions (1, 3) and (0, 1), then (2, 3) and nothing
    assert indices.tolist() == [[1 | 3 << 2 | 0 << 4 | 1 << 6, 2 | 3 << 2]]


def test_the_zeros_of_a_group_with_fewer_codes_take_the_lowest_free_positions() -> None:
    _, indices = pack_24(torch.tensor([[0, 0, 0, 4, 0, 0, 0, 0]], dtype=torch.int8))
    assert indices.tolist() == [[0 | 3 << 2 | 0 << 4 | 1 << 6]]
    _, indices = pack_24(torch.tensor([[4, 0, 0, 0]], dtype=torch.int8))
    assert indices.tolist() == [[0 | 1 << 2]]


def test_the_dense_bytes_are_the_documented_ones() -> None:
    packed = pack_nibbles(torch.tensor([[-7, 7, 0]], dtype=torch.int8))
    assert packed.tolist() == [[1 | 15 << 4, 8 | 8 << 4]]


def test_what_is_stored_is_contiguous_bytes() -> None:
    codes = torch.zeros(8, 12, dtype=torch.int8)
    for view in (codes, codes[::2], codes.T.contiguous().T):
        for packed in (*pack_24(view), pack_nibbles(view)):
            assert packed.dtype == torch.uint8
            assert packed.is_contiguous()


@pytest.mark.parametrize("full", [3, 4])
@pytest.mark.parametrize("where", [0, 5])
def test_a_group_with_more_than_two_codes_is_refused(full: int, where: int) -> None:
    codes = torch.zeros(6, 8, dtype=torch.int8)
    codes[where, 4 : 4 + full] = torch.tensor([1, -1, 7, 2], dtype=torch.int8)[:full]
    with pytest.raises(AssertionError, match="more than two"):
        pack_24(codes)


def test_a_width_that_is_no_multiple_of_four_is_refused() -> None:
    with pytest.raises(RuntimeError):
        pack_24(torch.zeros(2, 6, dtype=torch.int8))


def test_packing_leaves_the_codes_as_they_were() -> None:
    codes = torch.tensor([[0, 3, 0, -7]], dtype=torch.int8)
    before = codes.clone()
    pack_24(codes)
    pack_nibbles(codes)
    assert torch.equal(codes, before)


def test_the_sparse_layout_is_three_quarters_of_the_dense_one() -> None:
    assert bytes_24(64, 128, 1) - 2 == 0.75 * (bytes_int4(64, 128, 1) - 2)


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
