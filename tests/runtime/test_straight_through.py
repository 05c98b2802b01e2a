"""Trained floats and their stored form: the numbers of slimfx.methods, masks as they were."""

import pytest
import torch
from models import bits
from slimfx.runtime.pack import (
    Packed24,
    PackedBitmask,
    PackedDense,
    pack_24,
    pack_bitmask,
    pack_codes,
)
from slimfx.runtime.straight_through import kept, restore, rounding, trainable, why_not
from torch import Tensor

from slimfx.methods.absmax import absmax
from slimfx.methods.masks import NofM, keep
from slimfx.methods.quantized import Quantized, quantize

fake_quantize = torch.ops.slimfx.fake_quantize
SHAPES = [(5, 7, 128), (3, 64, 16), (4, 20, 5), (2, 12, 12), (6, 1, 1)]


def weight(N: int, K: int, group: int) -> Tensor:
    """Random, with a group of zeros and one whose codes lie halfway between two."""
    w = torch.randn(N, K)
    w[0, : min(K, group)] = 0
    w[1, : min(K, group)] = torch.arange(min(K, group)) % 15 - 7.5
    return w


def coded(w: Tensor, width: int, group: int) -> Quantized:
    scale = absmax(w, bits=width, granularity="group", group=group)
    return quantize(w, scale, group=group, bits=width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize(("N", "K", "group"), SHAPES)
def test_the_numbers_are_those_of_the_library(
    N: int, K: int, group: int, width: int, dtype: torch.dtype
) -> None:
    w = weight(N, K, group).to(dtype)
    found = fake_quantize(w, width, group)
    assert bits(found) == bits(coded(w, width, group).dense().to(dtype))


def test_sixteen_bits_are_bfloat16() -> None:
    w = torch.randn(3, 5)
    assert torch.equal(fake_quantize(w, 16, 1), w.bfloat16().float())


@pytest.mark.parametrize("width", [4, 16])
def test_gradients_pass_and_torch_finds_the_op_sound(width: int) -> None:
    w = torch.randn(3, 10, requires_grad=True)
    sent = torch.randn(3, 10)
    fake_quantize(w, width, 4).backward(sent)
    assert torch.equal(w.grad, sent)  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.slimfx.fake_quantize.default, (w, width, 4))
    torch.library.opcheck(torch.ops.slimfx.fake_quantize.default, (w.detach().bfloat16(), width, 4))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.ones(3), 4, 4), r"w is \(3,\)"),
        ((torch.ones(3, 4), 5, 4), "5 bits"),
        ((torch.ones(3, 4), 4, 0), "groups of 0"),
    ],
)
def test_what_no_layout_has_is_refused(arguments: tuple, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        fake_quantize(*arguments)


def stored(kind: str, K: int = 24, group: int = 8) -> PackedDense | Packed24 | PackedBitmask:
    """A matrix [6, K] as a recipe stores it."""
    w = torch.randn(6, K)
    if kind == "dense":
        made = coded(w, 4, group)
        return PackedDense(pack_codes(made.codes, 4), made.scale, 4, group)
    if kind.startswith("2:4"):
        w = w * keep(w.abs(), NofM(2, 4))
        w[2, 4:8] = 0  # fewer than two stay
        if kind == "2:4 floats":
            return Packed24(*pack_24(w.bfloat16(), 16), None, 16, K)
        made = coded(w, 4, group)
        return Packed24(*pack_24(made.codes, 4), made.scale, 4, group)
    mask = torch.rand(6, K) < 0.5
    made = coded(w * mask, 4, group)
    return PackedBitmask(*pack_bitmask(made.codes, mask, 4), made.scale, 4, group)


KINDS = ["dense", "2:4", "2:4 floats", "bitmask"]


def parts(matrix: object) -> dict[str, bytes]:
    return {name: bits(value) for name, value in vars(matrix).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_trained_is_stored_as_it_was(kind: str) -> None:
    matrix = stored(kind)
    assert why_not(matrix, 24) is None
    again = restore(matrix, trainable(matrix, 24))
    assert parts(again) == parts(matrix)
    assert (again.bits, again.group) == (matrix.bits, matrix.group)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_stored_as_it_was_rounded(kind: str) -> None:
    matrix = stored(kind)
    trained = trainable(matrix, 24) + torch.randn(6, 24) / 5
    mask = kept(matrix, 24)
    how = rounding(matrix, 24)
    assert how is not None and (mask is None) == (kind == "dense")
    again = restore(matrix, trained)
    expected = fake_quantize(trained if mask is None else trained * mask, *how)
    assert torch.equal(trainable(again, 24), expected)
    assert parts(again) != parts(matrix)
    for name in ("mask", "indices"):
        assert getattr(again, name, None) is getattr(matrix, name, None)


def test_a_float_matrix_keeps_its_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(3, 4).to(dtype)
        again = restore(matrix, trainable(matrix, 4))
        assert isinstance(again, Tensor) and bits(again) == bits(matrix)
    assert rounding(torch.ones(3, 4), 4) is None
    assert rounding(torch.ones(3, 4).bfloat16(), 4) == (16, 1)


def test_one_scale_for_each_row_is_one_group() -> None:
    w = torch.randn(6, 24)
    scale = absmax(w, bits=4, granularity="channel", group=8)
    made = quantize(w, scale, group=8, bits=4)
    matrix = PackedDense(pack_codes(made.codes, 4), scale, 4, 8)
    assert parts(restore(matrix, trainable(matrix, 24))) == parts(matrix)


def test_one_scale_for_all_rows_cannot_be_trained() -> None:
    matrix = PackedDense(torch.zeros(6, 12, dtype=torch.uint8), torch.ones(1, 1).bfloat16(), 4, 8)
    assert why_not(matrix, 24) == "its scales are (1, 1) for 6 rows, not one or more for each row"
