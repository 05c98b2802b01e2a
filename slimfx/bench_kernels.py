"""How long one linear [N, K] takes: our CPU kernels beside floats and the int4 of other libraries.

    y [M, N] = x [M, K] W^T [+ (x L^T) R^T]

Every contender of a shape is measured in turn, in rounds, in one run. Its weights lie in so many
copies, read one after the other, that no cache holds them. A wrong product is never timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimfx.bench_check import product_error, sample
from slimfx.bench_contenders import GROUP, Call, Contender, Shape, contenders
from slimfx.errors import SlimError

Progress = Callable[[float, str], None]
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def largest_cache(folder: Path = _CACHES) -> int:
    """Bytes of the largest cache that Linux names; 0 elsewhere."""
    sizes = (path.read_text().strip() for path in folder.glob("index*/size"))
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)


COPIES = max(200_000_000, 2 * largest_cache())
"""Bytes of weights that one contender's copies have at least: more than any cache holds."""
_ROUNDS = 5
_SECONDS = 0.3
_READ = 2 * COPIES
_READS = 12
MODELS = {
    "llama-2-7b": (Shape(4096, 4096), Shape(4096, 11008), Shape(11008, 4096)),
    "llama-2-13b": (Shape(5120, 5120), Shape(5120, 13824), Shape(13824, 5120)),
    "llama-3-8b": (
        *(Shape(4096, 4096), Shape(4096, 1024)),
        *(Shape(4096, 14336), Shape(14336, 4096)),
    ),
    "llama-3-70b": (
        *(Shape(8192, 8192), Shape(8192, 1024)),
        *(Shape(8192, 28672), Shape(28672, 8192)),
    ),
}
"""The distinct linears of a block."""


@dataclass(frozen=True)
class KernelRow:
    """One contender on one shape and M; its figures are None where `note` says why."""

    shape: str
    """ "KxN"."""
    M: int
    name: str
    seconds: float | None = None
    """Median of a call."""
    spread: float | None = None
    """Third quartile less first, in seconds."""
    fastest: float | None = None
    """Seconds of the fastest call: what a machine that others use as well could do."""
    speedup: float | None = None
    """Seconds of float32 at this shape and M divided by these."""
    bytes: int | None = None
    """Of weights, scales and adapters, which every call reads once."""
    gb_per_second: float | None = None
    """`bytes` in `seconds`."""
    share: float | None = None
    """Of the fastest plain read of memory."""
    ceiling: float | None = None
    """That read in GB/s, measured before the shape."""
    error: float | None = None
    """max |y - exact| in standard deviations of the exact product, over up to 256 outputs."""
    note: str = ""


def shapes(text: str) -> list[Shape]:
    """ "llama-3-8b,4096x11008" -> its shapes without repetition.

    Raises:
        SlimError: a part is neither a model nor KxN with K in 128s and N in 16s.
    """
    found: list[Shape] = []
    for part in text.split(","):
        found += MODELS.get(part) or [_shape(part)]
    return list(dict.fromkeys(found))


def _shape(text: str) -> Shape:
    K, _, N = text.partition("x")
    if not (K.isdecimal() and N.isdecimal() and int(K) * int(N)):
        raise SlimError(f"shape {text!r} is neither KxN nor one of {', '.join(MODELS)}")
    if int(K) % GROUP or int(N) % 16:
        raise SlimError(f"shape {text}: K is no multiple of {GROUP}, or N none of 16")
    return Shape(int(K), int(N))


def bench_kernels(
    shapes: Sequence[Shape],
    M: Sequence[int] = (1, 4, 16, 64, 512),
    *,
    copies: int = COPIES,
    seconds: float = _SECONDS,
    progress: Progress | None = None,
) -> Iterator[KernelRow]:
    """Rows for every shape, M and contender, on as many threads as torch has; float32 comes first.

    Args:
        copies: bytes that the copies of a contender's weights have together, at least.
        seconds: that every contender is called for at each shape and M, five times at least.
        progress: called with the share done and what comes next.

    Raises:
        SlimError: a contender's product is wrong.
    """
    ceiling = 0.0
    for done, shape in enumerate(shapes):
        ceiling = max(ceiling, read_speed())
        torch._dynamo.reset()  # or the programs of earlier shapes count towards its limit
        found, notes = contenders(shape, copies)
        for place, m in enumerate(M):
            if progress is not None:
                progress((done + place / len(M)) / len(shapes), f"{shape} M={m}")
            with torch.no_grad():
                yield from _rows(shape, m, found, ceiling, seconds)
            yield from (KernelRow(str(shape), m, name, note=note) for name, note in notes.items())


def read_speed(size: int = _READ) -> float:
    """GB/s of the fastest plain read of `size` bytes that torch has."""
    memory = torch.ones(size // 8, dtype=torch.int64)
    floats = memory.view(torch.float64)
    reads = (memory.sum, floats.sum, memory.max, memory.count_nonzero)
    return size / min(_seconds(read) for read in reads for _ in range(_READS)) / 1e9


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _rows(
    shape: Shape, M: int, found: Sequence[Contender], ceiling: float, seconds: float
) -> Iterator[KernelRow]:
    x = torch.randn(M, shape.K, generator=torch.Generator().manual_seed(M)).bfloat16()
    bound, errors = [], []
    for contender in found:
        calls = contender.bind(x.to(contender.dtype))
        errors.append(_checked(contender, shape, x, calls[0]()))
        bound.append(calls)
    taken = in_rounds([itertools.cycle(calls) for calls in bound], seconds)
    base = statistics.median(taken[0])
    for contender, error, times in zip(found, errors, taken, strict=True):
        median = statistics.median(times)
        first, _, third = statistics.quantiles(times, n=4)
        speed = contender.bytes / median / 1e9
        yield KernelRow(
            *(str(shape), M, contender.name, median, third - first, min(times), base / median),
            *(contender.bytes, speed, speed / ceiling, ceiling, error),
        )


def _checked(contender: Contender, shape: Shape, x: Tensor, y: Tensor) -> float:
    what, exact = f"{contender.name} on {shape}, M={len(x)}", contender.exact(x.double())
    return product_error(what, y[:, sample(shape.N)], exact, contender.limit)


def in_rounds(turns: Sequence[Iterator[Call]], seconds: float) -> list[list[float]]:
    """Seconds of every call of every contender; what disturbs a round disturbs them all."""
    taken: list[list[float]] = [[] for _ in turns]
    for _ in range(_ROUNDS):
        for times, turn in zip(taken, turns, strict=True):
            next(turn)()
            end = time.perf_counter() + seconds / _ROUNDS
            times.append(_seconds(next(turn)))
            while time.perf_counter() < end:
                times.append(_seconds(next(turn)))
    return taken
