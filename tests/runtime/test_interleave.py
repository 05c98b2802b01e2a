"""The kernels' layout holds the same numbers as the stored one."""

import pytest
import torch
from cpu_linears import matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from slimfx.runtime.interleave import LANES, dense_weight, interleave, whole, why_not
from slimfx.runtime.ops import linear_24, linear_bitmask, linear_int
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedMatrix
from torch import Tensor

KINDS = [
    *[("dense", bits) for bits in (2, 3, 4, 8, 16, 32)],
    *[("2:4", bits) for bits in (2, 3, 4, 8, 16)],
    *[("bitmask", bits) for bits in (2, 3, 4, 8, 16)],
]


def dense(stored: PackedMatrix | Tensor, K: int) -> Tensor:
    """The weight [N, K] as the canonical ops read it, float64."""
    eye = torch.eye(K, dtype=torch.float64)
    if isinstance(stored, Tensor):
        return stored.double()
    rest = (stored.scale, stored.bits, stored.group)
    if isinstance(stored, PackedDense):
        return linear_int(eye, stored.codes, *rest).T
    if isinstance(stored, Packed24):
        return linear_24(eye, stored.values, stored.indices, *rest).T
    assert isinstance(stored, PackedBitmask)
    return linear_bitmask(eye, stored.values, stored.mask, *rest).T


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    N=st.integers(1, 40),
    fours=st.integers(1, 24),
    scales=st.sampled_from(["tensor", "row", "group"]),
    seed=st.integers(0, 99),
)
def test_the_layout_stands_for_the_stored_weight(
    kind: tuple[str, int], N: int, fours: int, scales: str, seed: int
) -> None:
    K = 4 * fours
    stored = matrix(kind, N, K, torch.Generator().manual_seed(seed), scales=scales)
    laid_out = interleave(stored, K)
    assert len(laid_out.data) * LANES == whole(N)
    assert torch.equal(dense_weight(laid_out, N, K, torch.float64), dense(stored, K))


@pytest.mark.parametrize(("kind", "bits"), [(("2:4", 4), 3.0), (("dense", 4), 4.0)])
def test_the_layout_takes_no_more_room_than_the_file(kind: tuple[str, int], bits: float) -> None:
    N, K = 64, 128
    data = interleave(matrix(kind, N, K, torch.Generator()), K).data
    assert data.numel() * 8 == bits * N * K


def test_groups_that_end_within_a_step_are_left_to_aten() -> None:
    stored = matrix(("dense", 4), 16, 48, torch.Generator(), scales="group")
    assert why_not(stored, 48) is None
    odd = PackedDense(stored.codes, stored.scale, 4, 24)
    assert why_not(odd, 48) == "groups of 24 inputs, not a multiple of 16"
    assert why_not(torch.zeros(2, 2, dtype=torch.float64), 2) is not None
