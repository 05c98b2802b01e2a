"""Codes of four bits for what fine-tuning trains, in the forward pass of every step.

    scale = max|w| / 7 of each group, rounded to bfloat16     code = w / scale, rounded, in [-7, 7]
    forward: w -> code * scale                                backward: the gradient as it comes

The numbers are those of `slimfx.methods`, bit for bit: a program that was tuned with them is packed
to the very same codes. A zero scale gives zero codes.
"""

from __future__ import annotations

from typing import Any

import torch
from slimfx.runtime.pack import PackedDense
from torch import Tensor

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")

_LARGEST = 16384
"""Inputs of a group that one program can hold."""


def fake_quantize(w: Tensor, *, group: int = 128) -> Tensor:
    """w [N, K] as its codes stand for it, in its dtype; gradients pass as if nothing happened."""
    return _StraightThrough.apply(w, group)


def quantize(w: Tensor, *, group: int = 128) -> PackedDense:
    """w [N, K] as four-bit codes with a scale for each group of inputs.

    Raises:
        SlimError: w is no matrix of 16 or 32-bit floats, or groups are odd or too large.
    """
    N, K = _check(w, group).shape
    codes = torch.empty(N, -(-K // 2), dtype=torch.uint8, device=w.device)
    scale = torch.empty(N, -(-K // group), dtype=torch.bfloat16, device=w.device)
    _launch(w, codes, scale, group)
    return PackedDense(codes, scale, 4, group)


class _StraightThrough(torch.autograd.Function):
    """torch asks for a class where a backward pass is not that of the forward one."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, group: int) -> Tensor:  # type: ignore[override]
        values = torch.empty_like(_check(w, group), memory_format=torch.contiguous_format)
        _launch(w, values, None, group)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def _check(w: Tensor, group: int) -> Tensor:
    if w.dim() != 2 or w.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise SlimError(
            f"quantize: w is {w.dtype} {tuple(w.shape)}, not bfloat16, float16 or float32 [N, K]"
        )
    if group < 2 or group % 2 or min(group, w.shape[1]) > _LARGEST:
        raise SlimError(
            f"quantize: groups of {group} inputs; set an even group of at most {_LARGEST}"
        )
    return w


def _launch(w: Tensor, out: Tensor, scale: Tensor | None, group: int) -> None:
    """Write codes and scales, or without scales the values that they stand for."""
    if not w.numel():
        return
    N, K = w.shape
    wide = max(2, triton.next_power_of_2(min(group, K)))
    rows = max(1, 2048 // wide)
    _quantize[(triton.cdiv(N, rows), triton.cdiv(K, group))](
        *(w.contiguous(), out, out if scale is None else scale, N, K),
        GROUP=group,
        CODES=scale is not None,
        ROWS=rows,
        WIDE=wide,
    )


@triton.jit
def _quantize(
    w,
    out,
    scale,
    N,
    K,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    row = tl.minimum(n, N - 1).to(tl.int64)
    j = tl.arange(0, WIDE)
    k = part * GROUP + j
    on = (n < N)[:, None] & ((j < GROUP) & (k < K))[None, :]
    given = tl.load(w + row[:, None] * K + k[None, :], mask=on, other=0).to(tl.float32)
    peak = tl.max(tl.abs(given), 1)
    stored = tl.div_rn(peak, 7.0).to(tl.bfloat16)
    step = stored.to(tl.float32)[:, None]
    ratio = tl.where(step > 0, tl.div_rn(given, tl.where(step > 0, step, 1.0)), 0.0)
    far = 12582912.0  # 1.5 2^23: what is left of a sum with it is whole, ties to even
    whole = tl.minimum(tl.maximum((ratio + far) - far, -7.0), 7.0)
    if CODES:
        low, high = tl.split((whole.to(tl.int32) + 8).reshape(ROWS, WIDE // 2, 2))
        pair = tl.arange(0, WIDE // 2)
        at = part * (GROUP // 2) + pair
        kept = (n < N)[:, None] & ((pair < GROUP // 2) & (at < tl.cdiv(K, 2)))[None, :]
        bytes_ = (low | (high << 4)).to(tl.uint8)
        tl.store(out + row[:, None] * tl.cdiv(K, 2) + at[None, :], bytes_, mask=kept)
        tl.store(scale + row * tl.cdiv(K, GROUP) + part, stored, mask=n < N)
    else:
        tl.store(
            out + row[:, None] * K + k[None, :], (whole * step).to(out.dtype.element_ty), mask=on
        )
