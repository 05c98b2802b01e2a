"""The ops of a compressed program: schema, shape rule, and a reference in plain ATen that is the
definition.

    linear_24   y = x @ (unpack_24(values, indices) * scale)^T
    linear_int4 y = x @ (unpack_nibbles(codes) * scale)^T

Both are opaque to torch.export and decompose on request: `REFERENCES` maps op to reference.
"""

import torch
from slimfx.runtime.pack import unpack_24, unpack_nibbles
from torch import Tensor
from torch.nn.functional import linear

_LIBRARY = torch.library.Library("slimfx", "DEF")


def linear_24(x: Tensor, values: Tensor, indices: Tensor, scale: Tensor) -> Tensor:
    """x [..., K] times a 2:4-sparse int4 weight [N, K].

    `scale` is [1, 1], [N, 1] or [N, G], where G divides K and each scale serves K / G inputs.
    """
    _check_24(x, values, indices, scale)
    codes = unpack_24(values, indices)
    return linear(x, _scaled(codes, scale, codes.shape[1] // scale.shape[1], x.dtype))


def linear_int4(x: Tensor, codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """x [..., K] times a dense int4 weight [N, K].

    `scale` is [1, 1], [N, 1] or [N, ceil(K / group)]; input j uses scale j // group.
    """
    _check_int4(x, codes, scale, group)
    return linear(x, _scaled(unpack_nibbles(codes, x.shape[-1]), scale, group, x.dtype))


def _scaled(codes: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(group, dim=1)[:, : codes.shape[1]]
    return codes.to(dtype) * scale.to(dtype)


def _check_24(x: Tensor, values: Tensor, indices: Tensor, scale: Tensor) -> None:
    N, K = values.shape[0], values.shape[1] * 4
    torch._check(x.shape[-1] == K, lambda: f"linear_24: x ends in {x.shape[-1]}, the weight in {K}")
    torch._check(
        indices.shape == (N, -(-K // 8)),
        lambda: f"linear_24: indices {tuple(indices.shape)} for a weight [{N}, {K}]",
    )
    torch._check(
        scale.shape[0] in (1, N) and K % scale.shape[1] == 0,
        lambda: f"linear_24: scale {tuple(scale.shape)} for a weight [{N}, {K}]",
    )


def _check_int4(x: Tensor, codes: Tensor, scale: Tensor, group: int) -> None:
    N, K = codes.shape[0], x.shape[-1]
    torch._check(
        codes.shape[1] == -(-K // 2),
        lambda: f"linear_int4: x ends in {K}, the codes have {codes.shape[1]} bytes a row",
    )
    torch._check(
        scale.shape[0] in (1, N) and scale.shape[1] in (1, -(-K // group)),
        lambda: f"linear_int4: scale {tuple(scale.shape)} for a weight [{N}, {K}], group {group}",
    )


def _fake_24(x: Tensor, values: Tensor, indices: Tensor, scale: Tensor) -> Tensor:
    _check_24(x, values, indices, scale)
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _fake_int4(x: Tensor, codes: Tensor, scale: Tensor, group: int) -> Tensor:
    _check_int4(x, codes, scale, group)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _define(schema: str, reference, fake):  # type: ignore[no-untyped-def]
    name = _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slimfx::{name}", fake, lib=_LIBRARY)


_define(
    "linear_24(Tensor x, Tensor values, Tensor indices, Tensor scale) -> Tensor",
    linear_24,
    _fake_24,
)
_define(
    "linear_int4(Tensor x, Tensor codes, Tensor scale, int group) -> Tensor",
    linear_int4,
    _fake_int4,
)

REFERENCES = {
    torch.ops.slimfx.linear_24.default: linear_24,
    torch.ops.slimfx.linear_int4.default: linear_int4,
}
"""Every op of a compressed program and its definition in ATen."""
