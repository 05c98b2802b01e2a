"""A stored weight as the dense matrix that it stands for, so that the library's GEMM can take it.

    W[i, j] = value[i, j] * scale[i, j // group]        stored bytes in, 16 or 32-bit floats out

For prefill: above a few hundred rows of x this and one product are faster than products that expand
the weight again for every block of rows. A program reads the bytes of eight inputs of a row at a
time and writes these next to each other: it waits for memory, not for arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from slimfx.runtime.kernels.bitmask import Bits, bits_of, inputs_of, row_start, tile_bits
from slimfx.runtime.kernels.portable import check_sizes
from slimfx.runtime.kernels.portable_24 import Words24, tile_24
from slimfx.runtime.kernels.portable_int4 import Words4, joined, tile_4
from slimfx.runtime.pack import FLOAT_BITS, Packed24, PackedBitmask, PackedDense, PackedMatrix
from torch import Tensor
from torch.nn.functional import linear

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")

_FLOATS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
_INPUTS, _WEIGHTS = 512, 4096
"""What a program takes of a row, and in all."""

Expandable = PackedMatrix | Words24 | Words4 | Bits
"""What `expand` takes: weights as stored or, faster, as the products of this package read them."""


def prefill(
    x: Tensor,
    weight: Expandable,
    L: Expandable | Tensor | None = None,
    R: Expandable | Tensor | None = None,
    *,
    scratch: Tensor | None = None,
) -> Tensor:
    """y [..., N] = x W^T + (x L^T) R^T, each weight expanded first.

    Args:
        scratch: memory for W [N, K], in the dtype of x, that the next call may use again.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = linear(rows, expand(weight, x.shape[-1], x.dtype, out=scratch))
    if L is not None and R is not None:
        z = linear(rows, _dense(L, x.shape[-1], x.dtype))
        y.addmm_(z, _dense(R, z.shape[-1], x.dtype).T)
    return y.view(*x.shape[:-1], -1)


def _dense(matrix: Expandable | Tensor, K: int, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype) if isinstance(matrix, Tensor) else expand(matrix, K, dtype)


def expand(weight: Expandable, K: int, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The dense weight [N, K], bit for bit as the ops of `runtime/ops.py` read it.

    Raises:
        SlimError: no kernel writes this dtype, `out` is of another dtype, shape or layout, or
            the weight has another width.
    """
    if isinstance(weight, PackedBitmask):
        weight = bits_of(weight, K)
    where, stored, N = _arrays(weight, K)
    W = _out(out, N, K, dtype, stored[0].device)
    scale = weight.scale
    step = stored[0] if scale is None else scale
    inputs = inputs_of(step, weight.group) if where == "bitmask" else _INPUTS
    rows, per = _WEIGHTS // inputs, {"words 2:4": 16, "bitmask": 32}.get(where, 8)
    if W.numel():
        _expand[(triton.cdiv(N, rows), triton.cdiv(K, inputs))](
            *(*stored, step, W, N, K, stored[0].stride(0)),
            0 if scale is None or scale.shape[0] == 1 else scale.shape[1],
            WHERE=where,
            BITS=4 if isinstance(weight, Words24 | Words4) else weight.bits,
            PRMT=W.is_cuda and torch.version.hip is None,
            SCALED=scale is not None,
            GROUP=0 if scale is None or scale.shape[1] == 1 else weight.group,
            OUT=_FLOATS[dtype],
            **{"ROWS": rows, "UNITS": inputs // per, "PER": per},
        )
    return W


def _arrays(weight: Expandable, K: int) -> tuple[str, tuple[Tensor, ...], int]:
    """Where values are, the four tensors that a kernel reads, and N."""
    if isinstance(weight, PackedDense):
        codes = weight.codes.contiguous()
        check_sizes("expand", {codes: -(-K * weight.bits // 8)}, weight.scale, weight.group, K)
        return "dense", (codes,) * 4, codes.shape[0]
    if isinstance(weight, Packed24):
        values, places = weight.values.contiguous(), weight.indices.contiguous()
        width = K // 2 if weight.bits == FLOAT_BITS else -(-K // 2 * weight.bits // 8)
        sizes = {values: width, places: -(-K // 8)}
        check_sizes("expand", sizes, weight.scale, weight.group, K)
        return "2:4", (values, places, values, values), values.shape[0]
    assert not isinstance(weight, PackedBitmask)  # `expand` has laid it out
    if weight.K != K:
        raise SlimError(f"expand: a weight of {weight.K} inputs, and x of {K}")
    if isinstance(weight, Words4):
        return "words dense", (weight.words,) * 4, weight.words.shape[0]
    if isinstance(weight, Words24):
        words, places = weight.words, weight.places
        return "words 2:4", (words, places, words, words), words.shape[0]
    stored = (weight.values, weight.mask, weight.rows, weight.blocks)
    return "bitmask", stored, weight.mask.shape[0]


def _out(out: Tensor | None, N: int, K: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype not in _FLOATS:
        raise SlimError(f"expand: {dtype} is not bfloat16, float16 or float32; convert x first")
    if out is None:
        return torch.empty(N, K, dtype=dtype, device=device)
    if out.dtype != dtype or tuple(out.shape) != (N, K) or not out.is_contiguous():
        raise SlimError(
            f"expand: scratch is {out.dtype} {tuple(out.shape)}, not contiguous {dtype} [{N}, {K}]"
        )
    return out


@triton.jit
def _code(values, number, on, BITS: tl.constexpr):
    """Value `number` of a row that begins at the pointer, as float32; 0 where not `on`."""
    if BITS == 16:
        return tl.load(values + number, mask=on, other=0).to(tl.float32)
    else:
        bit = number * BITS
        held = tl.load(values + (bit >> 3), mask=on, other=0).to(tl.int32)
        if BITS == 3:  # the one width whose codes may lie in two bytes
            more = on & ((bit & 7) > 5)
            held |= tl.load(values + (bit >> 3) + 1, mask=more, other=0).to(tl.int32) << 8
        biased = (held >> (bit & 7)) & ((1 << BITS) - 1)
        return tl.where(on, biased - (1 << (BITS - 1)), 0).to(tl.float32)


@triton.jit
def _dense_eight(values, eight, K, BITS: tl.constexpr):
    """Eight values each, float32 [n, m, 2, 2, 2], of rows that begin at the pointers [n, 1]."""
    k = 8 * eight
    v0, v1 = _code(values, k, k < K, BITS), _code(values, k + 1, k + 1 < K, BITS)
    v2, v3 = _code(values, k + 2, k + 2 < K, BITS), _code(values, k + 3, k + 3 < K, BITS)
    v4, v5 = _code(values, k + 4, k + 4 < K, BITS), _code(values, k + 5, k + 5 < K, BITS)
    v6, v7 = _code(values, k + 6, k + 6 < K, BITS), _code(values, k + 7, k + 7 < K, BITS)
    return joined(v0, v1, v2, v3, v4, v5, v6, v7)


@triton.jit
def _at(first, second, pair, j: tl.constexpr):
    """Place j of a group of four."""
    return tl.where((pair & 3) == j, first, 0.0) + tl.where(((pair >> 2) & 3) == j, second, 0.0)


@triton.jit
def _sparse_eight(values, places, eight, K, BITS: tl.constexpr):
    """As `_dense_eight`; the pointers `places` are [n, m]."""
    on, both = 8 * eight < K, 8 * eight + 4 < K
    p = tl.load(places, mask=on, other=0).to(tl.int32)
    a, b = _code(values, 4 * eight, on, BITS), _code(values, 4 * eight + 1, on, BITS)
    c, d = _code(values, 4 * eight + 2, both, BITS), _code(values, 4 * eight + 3, both, BITS)
    q = p >> 4
    v0, v1, v2, v3 = _at(a, b, p, 0), _at(a, b, p, 1), _at(a, b, p, 2), _at(a, b, p, 3)
    v4, v5, v6, v7 = _at(c, d, q, 0), _at(c, d, q, 1), _at(c, d, q, 2), _at(c, d, q, 3)
    return joined(v0, v1, v2, v3, v4, v5, v6, v7)


@triton.jit
def _expand(
    values,
    places,
    rows,
    blocks,
    scale,
    W,
    N,
    K,
    stride,
    scale_row,
    WHERE: tl.constexpr,
    BITS: tl.constexpr,
    PRMT: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    PER: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    part = tl.program_id(1)
    unit = (part * UNITS + tl.arange(0, UNITS))[None, :]
    HALF: tl.constexpr = tl.float16 if OUT == tl.float16 else tl.bfloat16
    at = values + row * stride
    if WHERE == "dense":
        tile = _dense_eight(at, unit, K, BITS)
    elif WHERE == "words dense":
        tile = tile_4(tl.load(at + unit, mask=PER * unit < K, other=0), HALF, PRMT)
    elif WHERE == "words 2:4":
        place = tl.load(places + row * stride + unit, mask=PER * unit < K, other=0)
        word = tl.load(at + unit, mask=PER * unit < K, other=0)
        tile = tile_24(word, place.to(tl.int32), HALF, PRMT)
    elif WHERE == "2:4":
        tile = _sparse_eight(at, places + row * tl.cdiv(K, 8) + unit, unit, K, BITS)
    else:
        width = tl.cdiv(K, 128) * 4
        word = tl.load(places + row * width + unit)
        begin, before = row_start(values, rows, row, BITS)
        number = before + tl.load(blocks + row * (width // UNITS) + part)
        tile = tile_bits(begin, word, number, BITS, tl.float32)
    tile = tile.reshape(ROWS, UNITS, PER).to(tl.float32)
    k = (PER * unit)[:, :, None] + tl.arange(0, PER)[None, None, :]
    if SCALED:
        step = scale + row * scale_row
        if GROUP == 0:
            s = tl.load(step)[:, :, None]
        elif GROUP % PER == 0:
            s = tl.load(step + PER * unit // GROUP, mask=PER * unit < K, other=0)[:, :, None]
        else:
            s = tl.load(step[:, :, None] + k // GROUP, mask=k < K, other=0)
        tile *= s.to(OUT).to(tl.float32)
    kept = (n < N)[:, None, None] & (k < K)
    tl.store(W + row[:, :, None] * K + k, tile.to(OUT), mask=kept)
