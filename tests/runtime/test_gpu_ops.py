"""`linear_gpu` by its definition: the numbers, the shapes, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpu_linears import matrix
from gpu_linears import Linear, linear
from slimfx.runtime.gpu_layout import lay_out, stacked
from slimfx.runtime.gpu_ops import launch
from slimfx.runtime.pack import Packed24
from slimfx.runtime.select import Gpu

from slimfx.errors import SlimError

OP = torch.ops.slimfx.linear_gpu
BOTH, STORED = ("fragments", "stored"), ("stored",)
INT4 = ("dense", 4)
CASES = {
    "2:4": lambda: linear(("2:4", 4), [35], 260),
    "2:4, adapters": lambda: linear(("2:4", 4), [40], 256, adapter=INT4, ranks=[37]),
    "2:4, parts": lambda: linear(("2:4", 4), [32, 16, 21], 128, scales="row"),
    "2:4, parts, adapters of several ranks": lambda: linear(
        ("2:4", 4), [32, 48, 20], 256, adapter=INT4, ranks=[40, 7, 33], scales="group"
    ),
    "2:4, parts, adapters in floats": lambda: linear(
        ("2:4", 4), [32, 20], 128, adapter=("dense", 16), ranks=[8, 5]
    ),
    "2:4 of two bits": lambda: linear(("2:4", 2), [32, 20], 128, scales="group"),
    "2:4 of eight bits": lambda: linear(("2:4", 8), [20], 132, layouts=STORED, scales="group"),
    "2:4 floats": lambda: linear(("2:4", 16), [20], 64, layouts=STORED),
    "int4": lambda: linear(INT4, [35], 130, scales="group"),
    "int4, parts, adapters": lambda: linear(
        INT4, [16, 20], 192, adapter=INT4, ranks=[16, 12], scales="group"
    ),
    "int3": lambda: linear(("dense", 3), [20], 100, layouts=STORED, scales="row"),
    "bitmask": lambda: linear(("bitmask", 4), [20], 140, layouts=STORED, scales="group"),
    "bitmask of three bits": lambda: linear(("bitmask", 3), [20], 140, layouts=STORED),
    "bitmask floats": lambda: linear(("bitmask", 16), [20], 64, layouts=STORED),
    "sparse adapters": lambda: linear(
        ("2:4", 4), [32], 128, adapter=("2:4", 4), ranks=[36], layouts=STORED
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_layout_stands_for_the_same_weight(name: str) -> None:
    made = CASES[name]()
    K = made.parts[0][0].shape[1]
    x = torch.randn(2, 3, K)
    for layout in made.held.layouts:
        y = OP(x, *made.only(layout).arguments())
        assert y.shape == (2, 3, sum(made.held.rows)) and y.dtype is torch.float32
        assert ((y.double() - made.exact(x)).abs() <= 2e-6 * made.magnitude(x)).all()
    half = x.bfloat16()
    y = OP(half, *made.arguments())
    limit = 2**-8 * made.exact(half).abs() + 1e-3 * made.magnitude(half)
    assert y.dtype is torch.bfloat16
    assert ((y.double() - made.exact(half)).abs() <= limit).all()


@pytest.mark.parametrize("name", ["2:4, parts, adapters of several ranks", "bitmask"])
def test_the_op_is_what_torch_asks_of_an_op(name: str) -> None:
    made = CASES[name]()
    x = torch.randn(3, made.parts[0][0].shape[1])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP.default, (x, *made.arguments()), test_utils=tests)


def changed(made: Linear, **values: object) -> Linear:
    return dataclasses.replace(made, held=dataclasses.replace(made.held, **values))


def test_what_does_not_fit_is_refused() -> None:
    made = CASES["2:4, adapters"]()
    x = torch.randn(2, 256)
    fragments, stored, form, rows, rank = made.arguments()
    wrong = [
        ((x[:, :128], fragments, stored, form, rows, rank), "L is .* in fragments, not"),
        ((x[:, :128], [], stored, form, rows, rank), "weight is .* not .40, 8"),
        ((x, [], [], form, rows, rank), "the weight has no layout"),
        ((x, fragments, stored[:-1], form, rows, rank), "tensors of stored for 3 matrices"),
        ((x, fragments, stored, form, rows, 0), "9 numbers of form, 1 parts, rank 0"),
        ((x, fragments, stored, form, [20, 20], rank), "rows .* not multiples of 16"),
        ((x.long(), fragments, stored, form, rows, rank), "x is torch.int64"),
        ((x, [], [*stored[:2], stored[2][:, :0], *stored[3:]], form, rows, rank), "scales, not"),
    ]
    for arguments, message in wrong:
        with pytest.raises((RuntimeError, ValueError), match=message):
            OP(*arguments)
        with pytest.raises((RuntimeError, ValueError), match=message):
            OP(*(torch.utils._pytree.tree_map_only(torch.Tensor, _meta, arguments)))


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def test_a_launch_without_a_kernel_says_why() -> None:
    made = CASES["2:4"]().only("fragments")
    with pytest.raises(SlimError, match=r"no kernel for 65 rows of x.*x has 65 rows, more than 64"):
        launch(torch.randn(65, 260).bfloat16(), made.held, Gpu("cuda", 90))
    empty = launch(torch.randn(0, 260).bfloat16(), made.held, Gpu("cuda", 90))
    assert empty.shape == (0, 35)


def test_the_stored_layout_is_no_copy_where_bytes_fit() -> None:
    draw = torch.Generator().manual_seed(0)
    packed = matrix(("2:4", 4), 16, 256, draw)
    assert isinstance(packed, Packed24)
    words = lay_out(*stacked([(packed, 256)]), "stored")
    assert words[0].data_ptr() == packed.values.data_ptr()
    assert words[1].data_ptr() == packed.indices.data_ptr()
