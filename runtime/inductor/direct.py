"""`linear.h` by itself, with sizes known at run time alone: one compilation times any linear.

The source and the compiler's flags are those of a compiled program, whose sizes are constants. The
bytes it multiplies by are anything: how long a kernel takes does not depend on them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from slimfx.runtime.cpu_ops import Form, groups
from slimfx.runtime.inductor.cpu_linear import CONSTANTS, library
from slimfx.runtime.interleave import LANES, whole
from torch import Tensor

from slimfx.errors import SlimError

_SOURCE = r"""
%s
extern "C" void run(const float* x, int64_t inputs, const slimfx::Part* part, float* y) {
  slimfx::linear<%s, false>(x, 1, inputs, part, 1,
      [&](int64_t, int64_t, int64_t n, int64_t width, const float* acc) {
    std::memcpy(y + n, acc, width * sizeof(float));
  });
}
"""
_LOWEST, _HIGHEST = 0x30, 0x40
"""Of bytes whose floats are neither tiny nor large and whose bitmasks keep half the values."""

_SLACK = 1 << 16
"""Bytes that a bitmask with more values than most may read behind its own."""


@dataclass(frozen=True)
class Sizes:
    """A linear of one part: its weight [N, K], and L and R where `rank` is not 0."""

    N: int
    K: int
    rank: int
    forms: tuple[Form, ...]


def memory(size: int) -> Tensor:
    """At least so many bytes for `calls` to multiply by."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(_LOWEST, _HIGHEST, (size + _SLACK,), dtype=torch.uint8, generator=draw)


def calls(sizes: Sizes, pool: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Without end, calls on a row of ones, each with the next bytes of the pool as its matrices;
    all return the same y.

    Raises:
        SlimError: there is no compiler, or it failed.
    """
    run = _compiled(*((form.where, form.bits) for form in sizes.forms))
    x, y = torch.ones(whole(sizes.K)), torch.empty(sizes.N)
    need, start = bytes_read(sizes), 0

    def call() -> Tensor:
        run(x.data_ptr(), sizes.K, part.data_ptr(), y.data_ptr())
        return y

    while True:
        start = start if start + need + _SLACK <= pool.numel() else 0
        part = torch.tensor(_part(sizes, pool.data_ptr() + start)[0])
        yield call
        start += need


def bytes_read(sizes: Sizes) -> int:
    """Of weight, scales and adapters in a call; half of the values of a bitmask stay."""
    return sum(_part(sizes, 0)[1])


def _part(sizes: Sizes, at: int) -> tuple[list[int], list[int]]:
    """A `Part` as its 19 numbers, matrices beginning at address `at`, and the bytes of each."""
    N, K, rank = sizes.N, sizes.K, whole(sizes.rank)
    numbers, used = [0, N, 0, rank], list[int]()
    shapes = ((N, K), (rank, K), (N, rank))[: 3 if rank else 1]
    for form, (rows, width) in zip(sizes.forms, shapes):
        tiles, size = whole(rows) // LANES, _tile_bytes(form, width)
        scale = at + sum(used) + tiles * size
        group = min(form.group, whole(width))
        numbers += [at + sum(used), scale, whole(width), group, size]
        used.append(-(-tiles * (size + 2 * LANES * groups(form, width)) // 64) * 64)
    return numbers + [0] * (19 - len(numbers)), used


def _tile_bytes(form: Form, K: int) -> int:
    """A bitmask has a word for 32 values, half of which stay in whole bytes; the tile that keeps
    the most has a little more, and all have what may be read behind their own.
    """
    if form.where != "bitmask":
        return form.tile_bytes(K)
    words = whole(K) // 2
    return 4 * words + words * 33 * form.bits // 16 + 128


@functools.cache
def _compiled(*kinds: tuple[str, int]) -> Callable[..., Any]:
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    names = [f"slimfx::Stored<slimfx::{CONSTANTS[where]}, {bits}>" for where, bits in kinds]
    stored = ", ".join(names if len(names) == 3 else names * 3)
    try:
        run = CppCodeCache.load(_SOURCE % (library(), stored), needs_vec_isa=True).run
    except (CppCompileError, InvalidCxxCompiler) as error:
        raise SlimError(
            f"this CPU's kernels cannot be compiled ({str(error).splitlines()[0]}); install g++ or "
            f"clang"
        ) from error
    run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    run.restype = None
    return run
