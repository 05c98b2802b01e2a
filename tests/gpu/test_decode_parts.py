"""Linears that share x, with adapters: what they refuse."""

from __future__ import annotations

import pytest
import torch
from gpu_linears import linear
from slimfx.runtime.gpu_layout import read_fragments
from slimfx.runtime.kernels.decode import decode_parts


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
