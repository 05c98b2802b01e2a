"""Rounding to 8-bit floating point: the op's own bits, and the machine code."""

from __future__ import annotations

import math

import offline
import pytest
import slimfx.runtime.ops  # noqa: F401  defines the op
import torch
from slimfx.runtime.kernels import fp8 as module
from slimfx.runtime.kernels.fp8 import fp8
from torch import Tensor

from slimfx.errors import SlimError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {2: torch.int16, 4: torch.int32}


def numbers(largest: float, dtype: torch.dtype) -> Tensor:
    """All bfloat16 numbers up to the largest, or those of float16 or of these as float32; and
    numbers halfway between two steps of either format, and next to these.
    """
    kind = torch.float16 if dtype is torch.float16 else torch.bfloat16
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind).float()
    sixteenths = torch.arange(1, 32) / 32 + 1
    halfway = (sixteenths * 2.0 ** torch.arange(-18, 16)[:, None]).flatten()
    near = [halfway, halfway * (1 + 2**-20), halfway * (1 - 2**-20)]
    x = torch.cat([every, *near, *[-part for part in near], torch.tensor([largest])])
    return x[x.abs() <= largest].to(dtype)


def rounded(device: str, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the kernel gives, and the op."""
    x = numbers(largest, dtype)
    return fp8(x.to(device)).cpu(), torch.ops.slimfx.quantize_fp8(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [2.0**-8, 448.0, 450.0, 65504.0, math.inf])
def test_every_number_is_rounded_as_the_op_does(
    run: offline.Run, largest: float, dtype: torch.dtype
) -> None:
    y, wanted = run(rounded, largest, dtype)
    bits = INTEGERS[y.itemsize]
    assert y.dtype == dtype and torch.equal(y.view(bits), wanted.view(bits))


def not_numbers(device: str) -> tuple[Tensor, Tensor]:
    """With a NaN the format is the wide one, and the NaN stays."""
    x = torch.tensor([[1.07, math.nan], [-math.inf, 300.0]])
    return fp8(x.to(device)).cpu(), torch.ops.slimfx.quantize_fp8(x)


def test_a_nan_stays(run: offline.Run) -> None:
    y, wanted = run(not_numbers)
    assert y[0, 1].isnan() and y.shape == (2, 2)
    assert torch.equal(y.nan_to_num(0.0), wanted.nan_to_num(0.0))
    assert y[1, 0] == -57344 and y[0, 0] == 1.0


def several(device: str) -> list[bool]:
    """Of a tensor in rows that lie apart, and of none."""
    x = torch.randn(7, 3000, generator=torch.Generator().manual_seed(0)).to(device)
    apart = fp8(x[:, ::2])
    same = torch.equal(apart.cpu(), torch.ops.slimfx.quantize_fp8(x[:, ::2].cpu()))
    return [same, fp8(x[:0]).shape == (0, 3000)]


def test_rows_may_lie_apart_and_may_be_none(run: offline.Run) -> None:
    assert run(several) == [True, True]


def test_another_dtype_is_refused() -> None:
    with pytest.raises(SlimError, match=r"fp8: x is torch\.float64, not bfloat16"):
        fp8(torch.zeros(3).double())


@pytest.mark.parametrize("target", list(offline.TARGETS))
def test_it_compiles(target: str) -> None:
    types = {"x": "*bf16", "peak": "*i32", "y": "*bf16", "count": "i32"}
    for kernel in (module._peak, module._round):
        wanted = {name: types[name] for name in kernel.arg_names if name in types}
        built = offline.compile(kernel, wanted, {"BLOCK": 1024}, target, multiples=("count",))
        if target == "gfx942":
            assert ".vgpr_spill_count: 0" in built.asm["amdgcn"]
        else:
            code = offline.sass(built)
            assert offline.count(code.opcodes, "DADD", "DMUL", "DFMA", "LDL", "STL") == 0
            assert offline.count(code.opcodes, "LDG.128") == 1
