"""The ops of a compressed program: schema, shape rule, and a reference in plain ATen that is the
definition.

    linear_int      y = x @ (unpack_codes(codes) * scale)^T
    linear_24       y = x @ (unpack_24(values, indices) * scale)^T
    linear_bitmask  y = x @ (unpack_bitmask(values, mask) * scale)^T
    quantize_fp8    y = x as 8-bit floating point would carry it

All are opaque to torch.export and decompose on request: `REFERENCES` maps op to reference. The
gradient reaches x alone; what is stored is constant. The backward pass unpacks the weight anew and
lets it go. Through `quantize_fp8` the gradient passes as if nothing happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from slimfx.runtime.pack import CODE_BITS, FLOAT_BITS, unpack_24, unpack_bitmask, unpack_codes
from torch import Tensor
from torch.nn.functional import linear

_LIBRARY = torch.library.Library("slimfx", "DEF")


def linear_int(x: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    """x [..., K] times a dense weight [N, K] of integer codes.

    `scale` is [1, 1], [N, 1] or [N, ceil(K / group)]; input j uses scale j // group.
    """
    _check_int(x, codes, scale, bits, group)
    return linear(x, _dense(unpack_codes(codes, bits, x.shape[-1]), scale, group, x.dtype))


def linear_24(
    x: Tensor, values: Tensor, indices: Tensor, scale: Tensor | None, bits: int, group: int
) -> Tensor:
    """x [..., K] times a 2:4-sparse weight [N, K]; `scale` as in `linear_int`, None at 16 bits."""
    _check_24(x, values, indices, scale, bits, group)
    weight = unpack_24(values, indices, bits, x.shape[-1])
    return linear(x, _dense(weight, scale, group, x.dtype))


def linear_bitmask(
    x: Tensor, values: Tensor, mask: Tensor, scale: Tensor | None, bits: int, group: int
) -> Tensor:
    """x [..., K] times a sparse weight [N, K]; `scale` as in `linear_int`, None at 16 bits."""
    _check_bitmask(x, values, mask, scale, bits, group)
    weight = unpack_bitmask(values, mask, bits, x.shape[-1])
    return linear(x, _dense(weight, scale, group, x.dtype))


def quantize_fp8(x: Tensor) -> Tensor:
    """x rounded to 8-bit floating point and back, in its own dtype and shape.

    E4M3 where the largest |x| of the tensor is within its range (448), else E5M2 (57344, beyond
    which values are cut off): dynamic, per tensor (arXiv 2410.09615, appendix B).
    """
    peak = x.abs().amax() if x.numel() else x.new_zeros(())
    e4m3, e5m2 = (
        x.clamp(-limit, limit).to(dtype).to(x.dtype)
        for dtype, limit in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0))
    )
    return torch.where(peak <= 448.0, e4m3, e5m2)


def _dense(weight: Tensor, scale: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return weight.to(dtype)
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
    return weight.to(dtype) * scale.to(dtype)


def _check_int(x: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int) -> None:
    _check_numbers("linear_int", bits, CODE_BITS, group)
    _check_bytes("linear_int", x, codes, -(-x.shape[-1] * bits // 8), "codes")
    _check_scale("linear_int", codes.shape[0], x.shape[-1], scale, group)


def _check_24(
    x: Tensor, values: Tensor, indices: Tensor, scale: Tensor | None, bits: int, group: int
) -> None:
    _check_numbers("linear_24", bits, (*CODE_BITS, FLOAT_BITS), group)
    N, K = values.shape[0], x.shape[-1]
    torch._check(K % 4 == 0, lambda: f"linear_24: x ends in {K}, not a multiple of 4")
    width = K // 2 if bits == FLOAT_BITS else -(-K // 2 * bits // 8)
    _check_bytes("linear_24", x, values, width, "values")
    torch._check(
        indices.shape == (N, -(-K // 8)),
        lambda: f"linear_24: indices {tuple(indices.shape)} for a weight [{N}, {K}]",
    )
    _check_values("linear_24", values, scale, bits)
    _check_scale("linear_24", N, K, scale, group)


def _check_bitmask(
    x: Tensor, values: Tensor, mask: Tensor, scale: Tensor | None, bits: int, group: int
) -> None:
    _check_numbers("linear_bitmask", bits, (*CODE_BITS, FLOAT_BITS), group)
    K = x.shape[-1]
    torch._check(
        values.dim() == 1 and values.shape[0] > 0,
        lambda: f"linear_bitmask: values {tuple(values.shape)}, not one row of at least one",
    )
    _check_bytes("linear_bitmask", x, mask, -(-K // 8), "mask")
    _check_values("linear_bitmask", values, scale, bits)
    _check_scale("linear_bitmask", mask.shape[0], K, scale, group)


def _check_numbers(op: str, bits: int, allowed: tuple[int, ...], group: int) -> None:
    torch._check(bits in allowed, lambda: f"{op}: {bits} bits, not one of {allowed}")
    torch._check(group >= 1, lambda: f"{op}: groups of {group}")


def _check_bytes(op: str, x: Tensor, stored: Tensor, width: int, what: str) -> None:
    torch._check(
        stored.dim() == 2 and stored.shape[1] == width,
        lambda: (
            f"{op}: x ends in {x.shape[-1]}, the {what} are {tuple(stored.shape)}, not [N, {width}]"
        ),
    )


def _check_values(op: str, values: Tensor, scale: Tensor | None, bits: int) -> None:
    torch._check(
        (scale is None) == (bits == FLOAT_BITS) == (values.dtype is torch.bfloat16),
        lambda: (
            f"{op}: values {values.dtype} of {bits} bits "
            f"{'without' if scale is None else 'with'} a scale"
        ),
    )


def _check_scale(op: str, N: int, K: int, scale: Tensor | None, group: int) -> None:
    torch._check(
        scale is None
        or (
            scale.dim() == 2 and scale.shape[0] in (1, N) and scale.shape[1] in (1, -(-K // group))
        ),
        lambda: (
            f"{op}: scale {None if scale is None else tuple(scale.shape)} for a weight "
            f"[{N}, {K}], group {group}"
        ),
    )


def _fake_int(x: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int) -> Tensor:
    _check_int(x, codes, scale, bits, group)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _fake_24(
    x: Tensor, values: Tensor, indices: Tensor, scale: Tensor | None, bits: int, group: int
) -> Tensor:
    _check_24(x, values, indices, scale, bits, group)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _fake_bitmask(
    x: Tensor, values: Tensor, mask: Tensor, scale: Tensor | None, bits: int, group: int
) -> Tensor:
    _check_bitmask(x, values, mask, scale, bits, group)
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def _define(schema: str, reference, fake):  # type: ignore[no-untyped-def]
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slimfx::{name}", fake, lib=_LIBRARY)


_SPARSE = "Tensor? scale, int bits, int group) -> Tensor"
_define(
    "linear_int(Tensor x, Tensor codes, Tensor scale, int bits, int group) -> Tensor",
    linear_int,
    _fake_int,
)
_define(f"linear_24(Tensor x, Tensor values, Tensor indices, {_SPARSE}", linear_24, _fake_24)
_define(
    f"linear_bitmask(Tensor x, Tensor values, Tensor mask, {_SPARSE}",
    linear_bitmask,
    _fake_bitmask,
)
_define("quantize_fp8(Tensor x) -> Tensor", quantize_fp8, torch.empty_like)


def _differentiate(name: str, unpack: Callable[..., Tensor]) -> None:
    """Let gradients reach x of an op (x, *packed, scale, bits, group); `unpack` is its layout's."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *stored, bits, group = inputs
        ctx.save_for_backward(*stored)
        ctx.numbers = x.shape[-1], bits, group

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *packed, scale = ctx.saved_tensors
        K, bits, group = ctx.numbers
        constant = (None,) * (len(packed) + 3)
        if not ctx.needs_input_grad[0]:
            return (None, *constant)
        return gradient @ _dense(unpack(*packed, bits, K), scale, group, gradient.dtype), *constant

    torch.library.register_autograd(
        f"slimfx::{name}", backward, setup_context=remember, lib=_LIBRARY
    )


_differentiate("linear_int", unpack_codes)
_differentiate("linear_24", unpack_24)
_differentiate("linear_bitmask", unpack_bitmask)
torch.library.register_autograd(
    "slimfx::quantize_fp8", lambda ctx, gradient: gradient, lib=_LIBRARY
)

REFERENCES = {
    torch.ops.slimfx.linear_int.default: linear_int,
    torch.ops.slimfx.linear_24.default: linear_24,
    torch.ops.slimfx.linear_bitmask.default: linear_bitmask,
    torch.ops.slimfx.quantize_fp8.default: quantize_fp8,
}
"""Every op of a compressed program and its definition in ATen."""
