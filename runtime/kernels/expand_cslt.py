"""A stored 2:4 weight in the compressed form of cuSPARSELt, whose products skip the zeros.

    y = x W^T        1024 rows of x and more, bfloat16 or float16, NVIDIA from sm_90 on

The compressed form of W [N, K] is first its kept values, row by row, then four bits for each group
of four inputs: the positions of its two values, the first in the low bits. In blocks of 64 rows,
each padded to that with positions 2 and 3, these bits follow each other, low half of a byte first,
in the order of an index whose bits are, for group g of row n, the most significant first:

    n / 64 | g / 8 | n_5 n_4 | n_2 n_1 n_0 | g_1 g_0 | g_2 | n_3

`blob` is that definition. It was read from what cuSPARSELt 0.8 compresses on sm_90, which promises
nothing, so `why_not` compares the two on each device before the kernel is trusted.

A program reads words of four bits and writes both parts for 64 rows of some inputs. Of positions a
thread has eight groups in each of rows n, n + 1, n + 8 and n + 9: sixteen bytes that it writes at
once. So no thread needs what another one read, and all of them wait for memory alone.
"""

# Jitted functions are Triton's language: constants are annotations, tuples may grow.
# mypy: disable-error-code="name-defined,assignment,var-annotated"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from slimfx.runtime.kernels.portable import as_words
from slimfx.runtime.kernels.portable_24 import Words24
from slimfx.runtime.kernels.portable_int4 import joined
from torch import Tensor
from torch.nn.functional import pad

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")

_FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BLOCK = 64
"""Rows whose positions lie together; the kernel takes whole blocks, and inputs by as many."""
_OCTETS, _WARPS = 8, 4
"""Eights of groups that a program takes of 64 rows, and its warps."""
_EMPTY = 0b1110
"""Positions 2 and 3, where there is no row."""
_DEFAULT = (0, 1, -1)
"""An algorithm, parts of K and how these are added, as `torch._cslt_sparse_mm` takes them."""


def why_not(N: int, K: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a weight [N, K] cannot be multiplied here, or None."""
    if dtype not in _FLOATS:
        return f"x is {dtype}, not bfloat16 or float16"
    if N % _BLOCK or K % _BLOCK:
        return f"the weight is [{N}, {K}], not multiples of {_BLOCK}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is no NVIDIA GPU"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "the GPU is older than sm_90"
    checked = _checked()
    if (device, dtype) not in checked:
        if torch.cuda.is_current_stream_capturing():
            return "cuSPARSELt is not checked while a CUDA graph is recorded; run once before"
        checked[device, dtype] = _difference(device, dtype)
    return checked[device, dtype]


@cache
def _checked() -> dict[tuple[torch.device, torch.dtype], str | None]:
    """Devices and dtypes -> what `_difference` said."""
    return {}


def _difference(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the library compresses otherwise than `blob`, on a matrix of two blocks each way."""
    N, K = 2 * _BLOCK, 256
    draw = torch.Generator().manual_seed(0)
    order = torch.rand(N, K // 4, 4, generator=draw).argsort(-1)[..., :2].sort(-1).values
    values = torch.rand(N, K // 4, 2, generator=draw).add_(1).to(dtype)
    dense = torch.zeros(N, K // 4, 4, dtype=dtype).scatter_(2, order, values)
    both = (order[..., 0] | order[..., 1] << 2).to(torch.uint8)
    wanted = blob(values.flatten(1), both[:, ::2] | both[:, 1::2] << 4)
    try:
        found = torch._cslt_compress(dense.flatten(1).to(device))
    except RuntimeError as error:  # a GPU that this cuSPARSELt does not know
        return f"cuSPARSELt does not run: {str(error).splitlines()[0]}"
    if found.shape != wanted.shape or not torch.equal(found.cpu(), wanted):
        return f"cuSPARSELt {torch.backends.cusparselt.version()} has another compressed form here"
    return None


def blob(values: Tensor, indices: Tensor) -> Tensor:
    """The compressed form, as `torch._cslt_sparse_mm` takes it: sixteen bits [N, 9 K / 16], more
    columns if N is no multiple of 64.

    Args:
        values: what is kept [N, K / 2].
        indices: positions uint8 [N, K / 8], two groups a byte, as in `Packed24`.
    """
    N, K = values.shape[0], 2 * values.shape[1]
    both = torch.stack([indices & 15, indices >> 4], -1).flatten(1)
    both = pad(both, (0, 0, 0, -N % _BLOCK), value=_EMPTY)
    apart = both.reshape(-1, 4, 2, 8, K // 32, 2, 4)  # n / 64, n_54, n_3, n_210, g / 8, g_2, g_10
    nibbles = apart.permute(0, 4, 1, 3, 6, 5, 2).reshape(-1, 2)
    meta = (nibbles[:, 0] | nibbles[:, 1] << 4).view(values.dtype)
    whole = torch.cat([values.flatten(), meta])
    return pad(whole, (0, -whole.numel() % N)).view(N, -1)


def expand_cslt(weight: Words24, K: int, dtype: torch.dtype) -> Tensor:
    """The compressed form of a weight [N, K]: values as `expand` writes them, no zeros.

    Raises:
        SlimError: the weight has another width, or N, K or the dtype do not fit.
    """
    N, scale = weight.words.shape[0], weight.scale
    if weight.K != K:
        raise SlimError(f"expand_cslt: a weight of {weight.K} inputs, and x of {K}")
    if dtype not in _FLOATS or N % _BLOCK or K % _BLOCK:
        raise SlimError(
            f"expand_cslt: {dtype} [{N}, {K}], not bfloat16 or float16 in multiples of {_BLOCK}; "
            f"use expand"
        )
    out = torch.empty(N, K // 16 * 9, dtype=dtype, device=weight.words.device)
    meta = out.view(-1)[N * K // 2 :].view(torch.int32)
    grid = (triton.cdiv(K, 32 * _OCTETS), N // _BLOCK)
    _expand_cslt[grid](
        *(as_words(weight.words, torch.int32), as_words(weight.places, torch.int32)),
        *(scale, out, meta, K, weight.words.shape[1]),
        0 if scale.shape[0] == 1 else scale.shape[1],
        GROUP=0 if scale.shape[1] == 1 else weight.group,
        OUT=_FLOATS[dtype],
        OCTETS=_OCTETS,
        WARPS=_WARPS,
        num_warps=_WARPS,
    )
    return out


def multiply(compressed: Tensor, x: Tensor) -> Tensor:
    """y [M, N] = x [M, K] W^T for W in its compressed form.

    The library's algorithms differ by half in time, so the first product of each size searches for
    the best one; while a CUDA graph is recorded nothing can be searched.
    """
    M = x.shape[0]
    x = pad(x, (0, 0, 0, -M % 8)) if M % 8 else x.contiguous()
    if x.data_ptr() % 16:  # rows by eight and addresses by sixteen are all that the library takes
        x = x.clone()
    key = (x.device, x.dtype, compressed.shape[0], x.shape[1], (M - 1).bit_length())
    found = _algorithms()
    if key not in found and not torch.cuda.is_current_stream_capturing():
        search: Any = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
        found[key] = search(compressed, x.t(), None, None, None, True)[:3]
    algorithm, parts, how = found.get(key, _DEFAULT)
    return torch._cslt_sparse_mm(
        *(compressed, x.t()),
        transpose_result=True,
        alg_id=algorithm,
        split_k=parts,
        split_k_mode=how,
    )[:M]


@cache
def _algorithms() -> dict[tuple[Any, ...], tuple[int, int, int]]:
    """Device, dtype, N, K and M up to a power of two -> what the library found fastest."""
    return {}


@triton.jit
def _value(word, s, i: tl.constexpr, OUT: tl.constexpr):
    """Value i of words: under the exponent of 2^(23 - 4 i) a code is that number + code + 8."""
    AT: tl.constexpr = i if i < 5 else i - 3  # of the mantissa's 23 bits
    ONE: tl.constexpr = 1 << (23 - 4 * AT)
    bits = ((word if i < 5 else word >> 12) & (15 << (4 * AT))) | ((150 - 4 * AT) << 23)
    return ((bits.to(tl.float32, bitcast=True) - (ONE + 8.0)) * s).to(OUT)


@triton.jit
def _two_rows(a, b):
    """Eight groups of rows n and n + 8 as the layout has them: two words."""
    even = (a & 0x0F0F0F0F) | ((b & 0x0F0F0F0F) << 4)
    odd = ((a >> 4) & 0x0F0F0F0F) | (b & -0x0F0F0F10)
    first = (even & 0xFF) | ((even >> 8) & 0xFF00) | ((odd & 0xFF) << 16) | ((odd & 0xFF0000) << 8)
    last = ((even >> 8) & 0xFF) | ((even >> 16) & 0xFF00) | ((odd & 0xFF00) << 8)
    return first, last | (odd & -0x1000000)


@triton.jit
def _expand_cslt(
    words,
    places,
    scale,
    values,
    meta,
    K,
    width,
    scale_row,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
    OCTETS: tl.constexpr,
    WARPS: tl.constexpr,
):
    # Numbers of 64 bits lead to a block alone: the rest would cost more than all values do.
    part, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # As many rows as give each thread one word: of more it would take some that follow each other,
    # and what threads store at once would lie apart.
    ROWS: tl.constexpr = 16 * WARPS // OCTETS
    n = tl.arange(0, ROWS)[:, None]
    unit = 2 * OCTETS * part + tl.arange(0, 2 * OCTETS)[None, :]
    on = 16 * unit < K
    here = words + block * (64 * width) + (n * width + unit)
    steps = scale + block * (64 * scale_row) + n * scale_row
    if GROUP > 0:
        steps += 16 * tl.minimum(unit, K // 16 - 1) // GROUP
    held = ()
    for i in tl.static_range(64 // ROWS):
        held += (tl.load(here + i * ROWS * width, mask=on, other=0),)
        held += (tl.load(steps + i * ROWS * scale_row),)

    four = tl.arange(0, 16)[:, None]  # rows n, n + 1, n + 8 and n + 9
    octet, row = OCTETS * part + tl.arange(0, OCTETS)[None, :], width // 2
    inside = 32 * octet < K
    there = places + block * (64 * row) + (((four >> 2) * 16 + (four & 3) * 2) * row + octet)
    a, b = tl.load(there, mask=inside, other=0), tl.load(there + row, mask=inside, other=0)
    c = tl.load(there + 8 * row, mask=inside, other=0)
    d = tl.load(there + 9 * row, mask=inside, other=0)

    k = 16 * OCTETS * part + tl.arange(0, 16 * OCTETS)[None, :]
    for i in tl.static_range(64 // ROWS):
        word, s = held[2 * i], held[2 * i + 1].to(OUT).to(tl.float32)
        eight = joined(
            *(_value(word, s, 0, OUT), _value(word, s, 1, OUT)),
            *(_value(word, s, 2, OUT), _value(word, s, 3, OUT)),
            *(_value(word, s, 4, OUT), _value(word, s, 5, OUT)),
            *(_value(word, s, 6, OUT), _value(word, s, 7, OUT)),
        ).reshape(ROWS, 16 * OCTETS)
        at = (n + i * ROWS) * (K // 2) + k
        tl.store(values + block * (32 * K) + at, eight, mask=k < K // 2)
    w0, w1 = _two_rows(a, c)
    w2, w3 = _two_rows(b, d)
    out = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(16, OCTETS, 4)
    at = (64 * octet + 4 * four)[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(meta + block * (2 * K) + at, out, mask=inside[:, :, None])
