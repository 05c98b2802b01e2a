"""The table of `select`, row by row, and the sentences that say why not."""

from __future__ import annotations

import pytest
import torch
from slimfx.runtime.select import KERNELS, Form, Gpu, Layer, select, stretches

H100, A100, T4, MI300 = Gpu("cuda", 90), Gpu("cuda", 80), Gpu("cuda", 75), Gpu("hip", "gfx942")
SPARSE, DENSE, BITMASK = Form("2:4", 4, 0), Form("dense", 4, 128), Form("bitmask", 3, 0)
SLIM = Layer(SPARSE, (DENSE, DENSE))


@pytest.mark.parametrize(
    ("layer", "M", "gpu", "kernel"),
    [
        (SLIM, 1, H100, "decode_24"),
        (SLIM, 64, A100, "decode_24"),
        (SLIM, 32, H100, "decode_24"),
        (SLIM, 33, H100, "portable_24"),
        (Layer(Form("2:4", 3, 0)), 64, H100, "decode_24"),
        (Layer(Form("2:4", 3, 0)), 65, H100, "expand"),
        (SLIM, 160, H100, "portable_24"),
        (SLIM, 161, H100, "expand"),
        (SLIM, 1, T4, "portable_24"),
        (SLIM, 1, MI300, "portable_24"),
        (Layer(DENSE), 4, H100, "decode_int4"),
        (Layer(DENSE), 4, MI300, "portable_int4"),
        (Layer(BITMASK), 1, H100, "bitmask"),
        (Layer(BITMASK), 400, H100, "expand"),
        (Layer(Form("2:4", 8, 0)), 1, H100, "expand"),
        (Layer(Form("dense", 4, 16)), 1, H100, "portable_int4"),
        (Layer(Form("dense", 4, 24)), 1, H100, "expand"),
        (Layer(SPARSE, dtype=torch.float32), 1, H100, "portable_24"),
        (Layer(SPARSE, (Form("floats", 16, 0),) * 2), 1, H100, "decode_24"),
        (Layer(SPARSE, (Form("2:4", 4, 0),) * 2), 1, H100, "portable_24"),
        (Layer(SPARSE, dtype=torch.float64), 1, H100, None),
    ],
)
def test_the_table(layer: Layer, M: int, gpu: Gpu, kernel: str | None) -> None:
    choice = select(layer, M, gpu)
    assert choice.kernel == kernel
    assert set(choice.why_not) == set(KERNELS) - {kernel}
    assert all(choice.why_not.values())


def test_it_says_why_not() -> None:
    assert select(SLIM, 1, MI300).why_not["decode_24"] == (
        "gfx942 has no mma.sp and mma.sync instructions"
    )
    assert select(SLIM, 1, T4).why_not["decode_24"] == "sm_75 is older than sm_80"
    large = select(SLIM, 500, H100).why_not
    assert large["decode_24"] == "x has 500 rows, more than 64"
    assert large["decode_int4"] == "the weight has 2:4 values of 4 bits, not dense ones"
    assert large["portable_24"].startswith("above 160 rows of x")
    assert select(SLIM, 1, H100).why_not["expand"] == "decode_24 is faster for 1 rows of x"


def test_a_layout_that_was_not_made_is_not_chosen() -> None:
    choice = select(SLIM, 1, H100, layouts=("stored",))
    assert choice.kernel == "portable_24"
    assert choice.why_not["decode_24"] == (
        "the weight was not laid out for it: there is only stored"
    )
    assert select(SLIM, 64, H100, layouts=("fragments",)).kernel == "decode_24"
    assert select(SLIM, 65, H100, layouts=("fragments",)).kernel is None


def test_a_range_of_rows_is_cut_where_the_kernel_changes() -> None:
    found = [(each.kernel, each.rows) for each in stretches(SLIM, 1, 4096, H100)]
    assert found == [("decode_24", (1, 32)), ("portable_24", (33, 160)), ("expand", (161, 4096))]
    found = [(each.kernel, each.rows) for each in stretches(SLIM, 1, 4096, A100)]
    assert found == [("decode_24", (1, 64)), ("portable_24", (65, 160)), ("expand", (161, 4096))]
    found = [(each.kernel, each.rows) for each in stretches(SLIM, 1, 100, MI300)]
    assert found == [("portable_24", (1, 100))]
    assert [each.rows for each in stretches(SLIM, 20, 20, H100)] == [(20, 20)]
    assert [each.kernel for each in stretches(SLIM, 64, 65, A100)] == ["decode_24", "portable_24"]
