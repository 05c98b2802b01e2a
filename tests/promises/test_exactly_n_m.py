"""Promise 11: of every m weights exactly n stay, and packing loses nothing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slimfx.runtime.pack import pack_24, pack_codes, unpack_24, unpack_codes

from slimfx.methods.masks import NofM, keep


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10_000), st.booleans())
def test_exactly_n_m(rows: int, fours: int, seed: int, ties: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, 4 * fours, generator=draw)
    if ties:
        score = score.round()
    mask = keep(score, NofM(2, 4))
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    codes = torch.randint(-7, 8, mask.shape, generator=draw, dtype=torch.int8) * mask
    values, indices = pack_24(codes, 4)
    assert unpack_24(values, indices, 4, 4 * fours).equal(codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 50), st.sampled_from([2, 3, 4, 8]), st.integers(0, 999))
def test_pack_and_unpack_are_inverse(rows: int, columns: int, bits: int, seed: int) -> None:
    most = 2 ** (bits - 1) - 1
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-most, most + 1, (rows, columns), generator=draw, dtype=torch.int8)
    assert unpack_codes(pack_codes(codes, bits), bits, columns).equal(codes)
