"""The op of the CPU kernels: its reference, its shape rule, and what it refuses."""

import pytest
import torch
from cpu_linears import linear
from slimfx.runtime.cpu_ops import Form, forms, round_rows
from torch.library import opcheck

W4, D4 = ("2:4", 4), ("dense", 4)
CASES = {
    "bare": linear(W4, [40], 64),
    "adapters": linear(W4, [64, 20], 64, adapter=(D4, D4), ranks=[9, 5]),
    "bitmask": linear(("bitmask", 8), [33], 48),
    "floats": linear(("dense", 16), [16], 36, adapter=(("dense", 32), D4), ranks=[16]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounded", [False, True])
def test_opcheck(name: str, dtype: torch.dtype, rounded: bool) -> None:
    case = CASES[name]
    K = {"bare": 64, "adapters": 64, "bitmask": 48, "floats": 36}[name]
    x = torch.randn(2, 3, K).to(dtype)
    args = (x, *case.tensors, case.form, case.rows, case.ranks, rounded)
    opcheck(torch.ops.slimfx.linear_cpu, args)


def test_parts_follow_each_other() -> None:
    both, draw = CASES["adapters"], torch.randn(4, 64)
    y = both(draw)
    assert y.shape == (4, 84)
    first = linear(W4, [64], 64, adapter=(D4, D4), ranks=[9])
    # the generator draws the weights of all parts before any adapter, so compare without these
    bare = torch.ops.slimfx.linear_cpu(
        draw, *both.tensors[:2], None, None, None, None, both.form[:3], both.rows, []
    )
    alone = torch.ops.slimfx.linear_cpu(
        draw, *first.tensors[:2], None, None, None, None, first.form[:3], [64], []
    )
    torch.testing.assert_close(bare[:, :64], alone)


def test_rounding_is_to_127_steps_of_each_row() -> None:
    x = torch.tensor([[127.0, -3.4, 0.6], [0.0, 0.0, 0.0]])
    assert torch.equal(round_rows(x), torch.tensor([[127.0, -3.0, 1.0], [0.0, 0.0, 0.0]]))


def test_numbers_of_a_form_read_back() -> None:
    kinds = [Form("2:4", 4, 64), Form("dense", 8, 128), Form("bitmask", 16, 16)]
    assert forms([number for kind in kinds for number in kind.numbers()]) == kinds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 64, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.zeros(1, 96)}, "weight has"),
        ({"weight": torch.zeros(5, dtype=torch.uint8)}, "weight is torch.uint8"),
        ({"scale": torch.zeros(48)}, "weight has"),
        ({"rows": [40, 16]}, "rows \\[40, 16\\]"),
        ({"form": [1, 4, 64, 0]}, "4 numbers of form"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    case = CASES["bare"]
    given = {
        "x": torch.zeros(1, 64),
        **dict(zip(("weight", "scale"), case.tensors[:2])),
        **dict.fromkeys(("L", "L_scale", "R", "R_scale")),
        **{"form": case.form, "rows": case.rows, "ranks": []},
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.slimfx.linear_cpu(*{**given, **change}.values())
