"""The layout of ONNX Runtime's com.microsoft MatMulNBits, and an op of the same arithmetic.

A weight [N, K] of codes is cut along K into blocks of 16, 32, 64 or 128 inputs, the last one filled
up with zeros:

    B       uint8 [N, blocks, block * bits / 8]   code + 2^(bits-1); at 4 bits two a byte, low first
    scales  float32 [N * blocks]

Codes of 2 and 3 bits are widened to 4, those of 8 bits stay. Zeros of a sparse weight are written
like other codes. Accuracy level 1 multiplies floats; at 4 the runtime rounds x to eight bits, with
one step for each row and block of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from slimfx.runtime.pack import (
    PackedMatrix,
    pack_codes,
    stored_values,
    unpack_codes,
)
from torch import Tensor
from torch.nn.functional import linear, pad

BLOCKS = (128, 64, 32, 16)
"""Inputs that may share a scale."""
ACCURACIES = (1, 4)
"""Float32 or int8 activations, in the numbers of the runtime."""
_LIBRARY = torch.library.Library("slimfx", "FRAGMENT")


@dataclass(frozen=True)
class NBits:
    """A matrix [N, K] as MatMulNBits reads it."""

    B: Tensor
    scales: Tensor
    bits: int
    block: int


def why_not(matrix: PackedMatrix) -> str | None:
    """Why MatMulNBits does not take a matrix of codes, or None if it does."""
    if matrix.scale is None or matrix.scale.shape[1] == 1 or matrix.group % BLOCKS[-1] == 0:
        return None
    return f"groups of {matrix.group} inputs, not a multiple of {BLOCKS[-1]}"


def pack_nbits(matrix: PackedMatrix, K: int) -> NBits:
    """A stored weight [N, K] of codes in blocks: the legal size that takes the fewest bytes."""
    assert matrix.scale is not None, "pack_nbits: bfloat16 values have no codes"
    bits = max(4, matrix.bits)
    group = matrix.group if matrix.scale.shape[1] > 1 else 0  # 0: any block divides it
    block = min(
        (size for size in BLOCKS if group % size == 0),
        key=lambda size: (-(-K // size) * (size * bits // 8 + 4), -size),
    )
    codes = stored_values(matrix, K)
    filled = pad(codes, (0, -K % block))
    B = pack_codes(filled, bits).unflatten(1, (-1, block * bits // 8))
    scales = matrix.scale.float()
    if group:
        scales = scales.repeat_interleave(group // block, dim=1)[:, : B.shape[1]]
    scales = scales.expand(codes.shape[0], B.shape[1])
    return NBits(B, scales.flatten().contiguous(), bits, block)


def matmul_nbits(
    x: Tensor,
    B: Tensor,
    scales: Tensor,
    K: int,
    N: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    """x [..., K] times a weight [N, K] in blocks; the numbers are attributes of the ONNX op."""
    _check(x, B, scales, K, N, bits, block_size, accuracy_level)
    codes = unpack_codes(B.flatten(1), bits, B.shape[1] * block_size)
    weight = codes.to(x.dtype).unflatten(1, (-1, block_size)) * scales.to(x.dtype).view(N, -1, 1)
    inputs = _rounded(x, block_size) if accuracy_level == 4 else x
    return linear(inputs, weight.flatten(1)[:, :K])


def _rounded(x: Tensor, block: int) -> Tensor:
    """x as int8 of one step a block would carry it."""
    blocks = pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / step.clamp(min=torch.finfo(x.dtype).tiny)).round()
    return (codes * step).flatten(-2)[..., : x.shape[-1]]


def _check(
    x: Tensor,
    B: Tensor,
    scales: Tensor,
    K: int,
    N: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> None:
    blocks = -(-K // block_size)
    torch._check(
        bits in (4, 8) and block_size in BLOCKS and accuracy_level in ACCURACIES,
        lambda: f"matmul_nbits: {bits} bits, blocks of {block_size}, accuracy {accuracy_level}",
    )
    torch._check(x.shape[-1] == K, lambda: f"matmul_nbits: x ends in {x.shape[-1]}, not {K}")
    torch._check(
        B.shape == (N, blocks, block_size * bits // 8) and scales.shape == (N * blocks,),
        lambda: f"matmul_nbits: B {tuple(B.shape)}, scales {tuple(scales.shape)} for [{N}, {K}]",
    )


def _fake(
    x: Tensor,
    B: Tensor,
    scales: Tensor,
    K: int,
    N: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    _check(x, B, scales, K, N, bits, block_size, accuracy_level)
    return x.new_empty(*x.shape[:-1], N)


_LIBRARY.define(
    "matmul_nbits(Tensor x, Tensor B, Tensor scales, int K, int N, int bits, int block_size, "
    "int accuracy_level) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("matmul_nbits", matmul_nbits, "CompositeExplicitAutograd")
torch.library.register_fake("slimfx::matmul_nbits", _fake, lib=_LIBRARY)
