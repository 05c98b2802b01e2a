"""Four-bit codes in groups: the library's own bit for bit, and gradients that pass."""

from __future__ import annotations

import offline
import pytest
import torch
from slimfx.runtime.kernels import quantize as module
from slimfx.runtime.kernels.quantize import fake_quantize, quantize
from slimfx.runtime.pack import pack_codes
from torch import Tensor

from slimfx.errors import SlimError
from slimfx.methods import quantized
from slimfx.methods.absmax import absmax

CASES = {
    "less than a group": (5, 7, 128, torch.float32, 1.0),
    "many rows": (300, 128, 128, torch.float32, 0.02),
    "groups of 32": (33, 300, 32, torch.bfloat16, 1.0),
    "groups of 48": (3, 1000, 48, torch.float16, 1e-3),
    "one group": (2, 200, 200, torch.float32, 1e30),
    "below the normal numbers": (4, 128, 64, torch.float32, 1e-39),
}


def weight(N: int, K: int, group: int, dtype: torch.dtype, size: float) -> Tensor:
    """Random, with a group of zeros and one whose codes lie halfway between two."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(N)) * size
    w[0, : min(K, group)] = 0
    w[1, : min(K, group)] = (torch.arange(min(K, group)) % 15 - 7.5) * size
    return w.to(dtype)


def outcomes(
    device: str, N: int, K: int, group: int, dtype: torch.dtype, size: float
) -> tuple[Tensor, ...]:
    """Codes, scale, values and gradient."""
    w = weight(N, K, group, dtype, size).to(device).requires_grad_()
    packed = quantize(w.detach(), group=group)
    values = fake_quantize(w, group=group)
    sent = torch.arange(N * K, device=device).view(N, K).to(dtype)
    values.backward(sent)
    assert w.grad is not None and (packed.bits, packed.group) == (4, group)
    got = (packed.codes, packed.scale, values.detach(), w.grad, sent)
    return tuple(tensor.cpu() for tensor in got)


@pytest.mark.parametrize("name", CASES)
def test_codes_and_scales_are_those_of_the_library(run: offline.Run, name: str) -> None:
    codes, scale, values, gradient, sent = run(outcomes, *CASES[name])
    N, K, group, dtype, size = CASES[name]
    w = weight(N, K, group, dtype, size)
    wanted_scale = absmax(w, bits=4, granularity="group", group=group)
    wanted = quantized.quantize(w, wanted_scale, group=group, bits=4)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(codes, pack_codes(wanted.codes, 4))
    assert values.dtype == dtype and torch.equal(values, wanted.dense().to(dtype))
    assert torch.equal(gradient, sent)


def test_rows_need_not_lie_next_to_each_other(run: offline.Run) -> None:
    assert run(transposed)


def transposed(device: str) -> bool:
    """Is a transposed matrix read as such?"""
    w = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(device)
    same = torch.equal(fake_quantize(w.T, group=32), fake_quantize(w.T.contiguous(), group=32))
    return same and quantize(w[:, :0], group=32).codes.shape == (40, 0)


@pytest.mark.parametrize("group", [1, 33, 32768])
def test_a_group_that_no_kernel_takes_is_refused(group: int) -> None:
    with pytest.raises(SlimError, match=f"groups of {group} inputs; set an even group of at most"):
        quantize(torch.zeros(1, 40000), group=group)


def test_a_matrix_of_another_kind_is_refused() -> None:
    with pytest.raises(SlimError, match=r"w is torch\.float64 \(2, 4\)"):
        quantize(torch.zeros(2, 4).double())
    with pytest.raises(SlimError, match=r"w is torch\.float32 \(4,\), not bfloat16"):
        fake_quantize(torch.zeros(4))


@pytest.mark.parametrize("target", list(offline.TARGETS))
@pytest.mark.parametrize("codes", [False, True])
def test_it_compiles(target: str, codes: bool) -> None:
    types = {"w": "*bf16", "out": "*u8" if codes else "*bf16", "scale": "*bf16"}
    types |= {"N": "i32", "K": "i32"}
    constants = {"GROUP": 128, "CODES": codes, "ROWS": 16, "WIDE": 128}
    built = offline.compile(module._quantize, types, constants, target, multiples=("K",))
    if target == "gfx942":
        assert ".vgpr_spill_count: 0" in built.asm["amdgcn"]
        return
    code = offline.sass(built)
    assert offline.count(code.opcodes, "DADD", "DMUL", "DFMA", "LDL", "STL") == 0
    assert offline.count(code.opcodes, "LDG") == offline.count(code.opcodes, "LDG.128") > 0
    assert "div.rn.f32" in built.asm["ptx"] and "div.full.f32" not in built.asm["ptx"]
