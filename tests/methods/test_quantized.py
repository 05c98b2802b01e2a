"""Codes and scales: nearest code, ties to even, ragged groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slimfx.runtime.pack import CODE_BITS
from torch import Tensor

from slimfx.methods.quantized import (
    BITS,
    Parts,
    Quantized,
    as_float,
    largest_code,
    quantize,
    spread,
)


def dense(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """codes[i, j] * scale[i, j // group] one by one in float64."""
    out = torch.zeros(codes.shape, dtype=torch.float64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            row = i if scale.shape[0] > 1 else 0
            column = j // group if scale.shape[1] > 1 else 0
            out[i, j] = codes[i, j].item() * scale[row, column].item()
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """A weight, a scale of any form that clips some of it, group and bits."""
    N, K = draw(st.integers(1, 5)), draw(st.integers(1, 13))
    group, bits = draw(st.integers(1, 16)), draw(st.integers(2, 8))
    torch.manual_seed(draw(st.integers(0, 999)))
    shape = draw(st.sampled_from([(1, 1), (N, 1), (N, -(-K // group))]))
    scale = torch.rand(shape) / largest_code(bits) + 1e-3
    return torch.randn(N, K), scale.to(torch.bfloat16), group, bits


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_dense_is_code_times_scale(case: tuple[Tensor, Tensor, int, int]) -> None:
    W, scale, group, bits = case
    coded = quantize(W, scale, group=group, bits=bits)
    assert coded.codes.dtype == torch.int8
    assert torch.equal(coded.dense().double(), dense(coded.codes, scale, group).float().double())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_no_other_code_is_nearer(case: tuple[Tensor, Tensor, int, int]) -> None:
    W, scale, group, bits = case
    top = 2 ** (bits - 1) - 1
    coded = quantize(W, scale, group=group, bits=bits)
    assert coded.codes.abs().max() <= top
    step = dense(torch.ones_like(coded.codes), scale, group)
    every = torch.arange(-top, top + 1)[:, None, None] * step
    best = (every - W.double()).abs().amin(0)
    assert ((coded.dense().double() - W.double()).abs() <= best + 1e-6 * step).all()


def test_ties_go_to_the_even_code() -> None:
    W = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    coded = quantize(W, torch.ones(1, 1), group=6, bits=4)
    assert coded.codes.tolist() == [[0, 2, 2, 0, -2, -2]]


def test_a_weight_beyond_the_largest_code_is_clipped_on_both_sides_alike() -> None:
    coded = quantize(torch.tensor([[-100.0, -8.0, 8.0, 100.0]]), torch.ones(1, 1), group=4, bits=4)
    assert coded.codes.tolist() == [[-7, -7, 7, 7]]


def test_a_zero_scale_gives_zero_codes() -> None:
    scale = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)
    coded = quantize(torch.tensor([[3.0, 3.0, 3.0, 3.0]]), scale, group=2, bits=4)
    assert coded.codes.tolist() == [[0, 0, 3, 3]]
    assert coded.dense().tolist() == [[0.0, 0.0, 3.0, 3.0]]


def test_a_ragged_last_group_uses_the_last_scale() -> None:
    scale = torch.tensor([[1.0, 2.0, 4.0]])
    assert spread(scale, 2, 5).tolist() == [[1.0, 1.0, 2.0, 2.0, 4.0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_code_survives_being_quantized_again(bits: int) -> None:
    scale = torch.tensor([[0.123]], dtype=torch.bfloat16)
    top = largest_code(bits)
    codes = torch.arange(-top, top + 1, dtype=torch.int8)[None]
    again = quantize(Quantized(codes, scale, 15).dense(), scale, group=15, bits=bits)
    assert torch.equal(again.codes, codes)


@pytest.mark.parametrize(("bits", "top"), [(2, 1), (3, 3), (4, 7), (8, 127)])
def test_the_largest_code_leaves_the_range_symmetric(bits: int, top: int) -> None:
    assert largest_code(bits) == top


def test_as_float_is_the_dense_matrix_of_either_kind() -> None:
    coded = quantize(torch.randn(3, 8), torch.ones(1, 1), group=8, bits=4)
    assert torch.equal(as_float(coded), coded.dense())
    plain = torch.randn(3, 8).to(torch.bfloat16)
    assert torch.equal(as_float(plain), plain.float())
    assert as_float(plain).dtype == torch.float32


def test_parts_add_up_to_the_weight_and_the_product_of_the_adapter() -> None:
    weight, L, R = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    coded = quantize(L, torch.full((1, 1), 0.25), group=6, bits=4)
    torch.testing.assert_close(Parts(weight, L, R).dense(), weight + R @ L)
    torch.testing.assert_close(Parts(weight, coded, R).dense(), weight + R @ coded.dense())
    assert torch.equal(Parts(weight, None, None).dense(), weight)


def test_half_an_adapter_is_none() -> None:
    W = torch.randn(2, 3)
    assert torch.equal(Parts(W, torch.ones(1, 3), None).dense(), W)
    assert torch.equal(Parts(W, None, torch.ones(2, 1)).dense(), W)


def test_the_widths_are_those_that_the_layouts_store() -> None:
    assert BITS == CODE_BITS
