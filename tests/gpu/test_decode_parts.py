"""The second launch of joined linears: its machine code, and what it refuses."""

from __future__ import annotations

import offline
import pytest
import torch
from gpu_linears import linear
from slimfx.runtime.fragments import Fragments
from slimfx.runtime.gpu_layout import read_fragments
from slimfx.runtime.kernels.decode_parts import add_parts_kernel, decode_parts
from slimfx.runtime.kernels.mma import constants
from slimfx.runtime.kernels.warp import is_by_lane

TYPES = {
    **{"z": "*i32", "M": "i32", "words": "*i32", "scales": "*i32", "sums": "*fp32"},
    **{"y": "*bf16", "N": "i32", "N1": "i32", "N2": "i32", "N3": "i32"},
}


@pytest.mark.parametrize(
    ("target", "rows", "tiles"), [("sm_90", 1, 2), ("sm_90", 16, 1), ("sm_80", 16, 2)]
)
def test_rows_are_where_the_assembly_needs_them(target: str, rows: int, tiles: int) -> None:
    empty = torch.empty(0)
    R = Fragments(empty, empty, "dense", 6144, 416, 128)
    given = constants(R, rows) | {"RT": tiles, "NW": 2, "SUMS": 3, "NATURAL": False}
    given |= {"EARLY": target == "sm_90"}
    kernel = offline.compile(add_parts_kernel, TYPES, given, target, warps=2, multiples=("N",))
    assert is_by_lane(kernel.asm["ttgir"], 2)
    code = offline.sass(kernel)
    assert code.spills == 0 and offline.count(code.opcodes, "HMMA") > 0


def test_parts_that_do_not_fit_are_refused() -> None:
    made = linear(("2:4", 4), [32, 20], 256, adapter=("dense", 4), ranks=[16, 16])
    held = made.held
    W, L, R = (
        read_fragments(tensors, form, *size)
        for tensors, form, size in zip(held.tensors("fragments"), held.forms, held.sizes(256))
    )
    x = torch.randn(2, 256).bfloat16()
    with pytest.raises(RuntimeError, match=r"rows \[20, 32\], not up to 4 multiples of 16"):
        decode_parts(x, W, L, R, [20, 32])
    with pytest.raises(RuntimeError, match="does not fit 3 parts"):
        decode_parts(x, W, L, R, [16, 16, 20])
    with pytest.raises(RuntimeError, match=r"x is torch\.float32"):
        decode_parts(x.float(), W, L, R, [32, 20])
