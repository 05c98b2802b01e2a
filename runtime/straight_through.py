"""A stored adapter matrix as floats that can be trained, and back into its form.

    fake_quantize  w [N, K] -> what its stored form stands for; the gradient comes back as it is
                   4 bits: scale = max|w| / 7 of each group in bfloat16, code = w / scale rounded
                   16 bits: bfloat16

The numbers are those of `slimfx.methods` (absmax, quantize) bit for bit, so that what is trained is
what is packed. A zero scale gives zero codes.
"""

from __future__ import annotations

import torch
from slimfx.runtime.pack import (
    CODE_BITS,
    FLOAT_BITS,
    Packed24,
    PackedBitmask,
    PackedDense,
    PackedMatrix,
    pack_bitmask,
    pack_codes,
    stored_values,
    unpack_bits,
)
from torch import Tensor

_LIBRARY = torch.library.Library("slimfx", "FRAGMENT")


def fake_quantize(w: Tensor, bits: int, group: int) -> Tensor:
    """w [N, K] as `bits` for each value stand for it, with a scale for each `group` of inputs."""
    _check(w, bits, group)
    if bits == FLOAT_BITS:
        return w.to(torch.bfloat16).to(w.dtype, copy=True)
    codes, scale = _coded(w, bits, group)
    return (codes.float() * _spread(scale.float(), group, w.shape[1])).to(w.dtype)


def _coded(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scales bfloat16 [N, ceil(K / group)]."""
    top = 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(w.float().abs(), (0, -w.shape[1] % group))
    scale = (padded.unflatten(1, (-1, group)).amax(-1) / top).to(torch.bfloat16)
    step = _spread(scale.float(), group, w.shape[1])
    ratio = torch.where(step > 0, w.float() / step, torch.zeros((), device=w.device))
    return ratio.round().clamp(-top, top).to(torch.int8), scale


def _spread(scale: Tensor, group: int, width: int) -> Tensor:
    return scale.repeat_interleave(group, dim=1)[:, :width]


def _check(w: Tensor, bits: int, group: int) -> None:
    torch._check(w.dim() == 2, lambda: f"fake_quantize: w is {tuple(w.shape)}, not [N, K]")
    torch._check(
        bits in (*CODE_BITS, FLOAT_BITS),
        lambda: f"fake_quantize: {bits} bits, not one of {(*CODE_BITS, FLOAT_BITS)}",
    )
    torch._check(group >= 1, lambda: f"fake_quantize: groups of {group}")


def _fake(w: Tensor, bits: int, group: int) -> Tensor:
    _check(w, bits, group)
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _on_cuda(w: Tensor, bits: int, group: int) -> Tensor:
    """The same numbers by the Triton kernel, which has four bits and even groups."""
    if bits != 4 or group % 2 or w.dtype is torch.float64:
        return fake_quantize(w, bits, group)
    from slimfx.runtime.kernels import quantize  # triton, where there is a GPU

    return quantize.fake_quantize(w.detach(), group=group)


_LIBRARY.define(
    "fake_quantize(Tensor w, int bits, int group) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_LIBRARY.impl("fake_quantize", fake_quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("fake_quantize", _on_cuda, "CUDA")
torch.library.register_fake("slimfx::fake_quantize", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "slimfx::fake_quantize", lambda ctx, gradient: (gradient, None, None), lib=_LIBRARY
)


def why_not(matrix: PackedMatrix | Tensor, K: int) -> str | None:
    """Why a stored matrix cannot be trained: its scales are not those that `restore` would make."""
    if isinstance(matrix, Tensor) or matrix.scale is None:
        return None
    scale, N = matrix.scale, _floats(matrix, K).shape[0]
    if scale.shape[0] == N and scale.shape[1] in (1, -(-K // matrix.group)):
        return None
    return f"its scales are {tuple(scale.shape)} for {N} rows, not one or more for each row"


def trainable(matrix: PackedMatrix | Tensor, K: int) -> Tensor:
    """The float32 matrix [N, K] that a stored one stands for, in memory of its own."""
    if isinstance(matrix, Tensor):
        return matrix.detach().to(torch.float32, copy=True)
    return _floats(matrix, K).contiguous()


def _floats(matrix: PackedMatrix, K: int) -> Tensor:
    values = stored_values(matrix, K).float()
    if matrix.scale is None:
        return values
    scale = matrix.scale.float()
    return values * (scale if scale.shape[1] == 1 else _spread(scale, matrix.group, K))


def rounding(matrix: PackedMatrix | Tensor, K: int) -> tuple[int, int] | None:
    """The bits and group with which `fake_quantize` rounds as the matrix is stored; None for one
    of floats that needs none.
    """
    if isinstance(matrix, Tensor):
        return (FLOAT_BITS, 1) if matrix.dtype is torch.bfloat16 else None
    if matrix.scale is None:
        return FLOAT_BITS, 1
    return matrix.bits, K if matrix.scale.shape[1] == 1 else matrix.group


def kept(matrix: PackedMatrix | Tensor, K: int) -> Tensor | None:
    """Which weights of a sparse matrix may be other than zero, bool [N, K]; None: all."""
    if isinstance(matrix, Packed24):
        pairs = _places(matrix, K)
        return (
            torch.zeros(len(pairs), K // 4, 4, dtype=torch.bool, device=pairs.device)
            .scatter(-1, pairs, True)
            .flatten(1)
        )
    return unpack_bits(matrix.mask, K) if isinstance(matrix, PackedBitmask) else None


def _places(matrix: Packed24, K: int) -> Tensor:
    """Where the two values of each four are, int64 [N, K/4, 2]."""
    pairs = torch.stack([matrix.indices & 15, matrix.indices >> 4], -1).flatten(1)[:, : K // 4]
    return torch.stack([pairs & 3, pairs >> 2], -1).long()


def restore(matrix: PackedMatrix | Tensor, w: Tensor) -> PackedMatrix | Tensor:
    """Trained floats [N, K] in the form of the matrix they come from, its mask as it is."""
    if isinstance(matrix, Tensor):
        return w.detach().to(matrix.dtype)
    K = w.shape[1]
    mask, how = kept(matrix, K), rounding(matrix, K)
    assert how is not None
    w = w.detach() if mask is None else w.detach() * mask
    values, scale = (w.to(torch.bfloat16), None) if matrix.scale is None else _coded(w, *how)
    if isinstance(matrix, PackedDense):
        assert scale is not None
        return PackedDense(pack_codes(values, matrix.bits), scale, matrix.bits, matrix.group)
    if isinstance(matrix, PackedBitmask):
        assert mask is not None
        packed, _ = pack_bitmask(values, mask, matrix.bits)
        return PackedBitmask(packed, matrix.mask, scale, matrix.bits, matrix.group)
    two = values.unflatten(1, (-1, 4)).gather(-1, _places(matrix, K)).flatten(1)
    packed = two.contiguous() if scale is None else pack_codes(two, matrix.bits)
    return Packed24(packed, matrix.indices, scale, matrix.bits, matrix.group)
