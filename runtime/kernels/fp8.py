"""Activations rounded to 8-bit floating point: `quantize_fp8` of `runtime/ops.py` on a GPU.

E4M3 where the largest |x| of the tensor is within 448, else E5M2, cut off at 57344. Rounding is
float32 arithmetic, the same on every GPU, and needs no 8-bit types: with e the exponent of x and m
the bits of its mantissa, x + c - c is a multiple of 2^(e - m) where c = 1.5 2^(e - m + 23). What is
left is exact in 16 bits, and the products of this package take it so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")

_BLOCK = 1024
_E4M3 = tl.constexpr(448.0)
_E5M2 = tl.constexpr(57344.0)
_SIGN = tl.constexpr(-(2**31))


def fp8(x: Tensor) -> Tensor:
    """x as 8-bit floating point would carry it, in its own dtype and shape.

    Bit for bit `torch.ops.slimfx.quantize_fp8`, except which NaN a NaN becomes.

    Raises:
        SlimError: x is not bfloat16, float16 or float32.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise SlimError(f"fp8: x is {x.dtype}, not bfloat16, float16 or float32; convert it first")
    x = x.contiguous()
    y = torch.empty_like(x)
    if not x.numel():
        return y
    peak = torch.zeros(1, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    _peak[grid](x, peak, x.numel(), BLOCK=_BLOCK)
    _round[grid](x, peak, y, x.numel(), BLOCK=_BLOCK)
    return y


@triton.jit
def _peak(x, peak, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(x + at, mask=at < count, other=0).to(tl.float32).to(tl.int32, bitcast=True)
    # Floats without a sign order as their bits do, NaN last, and a maximum has no order of its own.
    tl.atomic_max(peak, tl.max(bits & 0x7FFFFFFF, 0), sem="relaxed")


@triton.jit
def _round(x, peak, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(x + at, mask=at < count, other=0).to(tl.float32)
    small = tl.load(peak).to(tl.float32, bitcast=True) <= _E4M3  # not so for NaN
    size = tl.minimum(tl.abs(given), tl.where(small, _E4M3, _E5M2))
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Steps are no smaller below 2^-6 (E4M3) and 2^-14 (E5M2) than there.
    power = tl.maximum(power, tl.where(small, 2.0**-6, 2.0**-14))
    far = power * tl.where(small, 1.5 * 2.0**20, 1.5 * 2.0**21)
    bits = ((size + far) - far).to(tl.int32, bitcast=True)
    signed = bits | (given.to(tl.int32, bitcast=True) & _SIGN)
    rounded = tl.where(given == given, signed.to(tl.float32, bitcast=True), given)
    tl.store(y + at, rounded.to(y.dtype.element_ty), mask=at < count)
