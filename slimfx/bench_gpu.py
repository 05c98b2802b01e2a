"""How long the linears of Llama take on a GPU: ours beside cuBLAS and torch's own int4.

    y [M, N] = x [M, K] W^T [+ (x L^T) R^T]

Each layer is what runs in one launch: q, k and v together, gate and up together. Weights lie in so
many copies, read one after the other by one CUDA graph, that no cache holds them; a time is the
median of its replays. A wrong product is never timed: its row says so.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slimfx.bench_check import product_error, sample
from slimfx.errors import SlimError, need
from slimfx.gpu_contenders import FLOAT, Contender, Layer, contenders
from slimfx.runtime.select import DECODE_ROWS

Progress = Callable[[float, str], None]
COPIES = 200_000_000
"""Bytes of weights that one contender's copies have at least."""
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
FAILED = "failed"
"""How the note of a row begins that could not be measured, or whose product is wrong."""
_SECONDS = 0.03
_COPIED = 1 << 30
_WIDTHS = {
    "llama-2-7b": (4096, 11008, 4096),
    "llama-3-8b": (4096, 14336, 1024),
    "llama-3-70b": (8192, 28672, 1024),
    "llama-2-13b": (5120, 13824, 5120),
}
"""Of the hidden state, between gate and down, and of k and v."""


@dataclass(frozen=True)
class GpuRow:
    """One contender on one layer and M; its figures are None where `note` says why."""

    layer: str
    M: int
    name: str
    kernel: str = ""
    """Ours that ran."""
    seconds: float | None = None
    """Median of a call."""
    spread: float | None = None
    """Third quartile less first, in seconds."""
    speedup: float | None = None
    """Seconds of bfloat16 at this layer and M divided by these."""
    bytes: int | None = None
    """Of weights, scales and adapters, which every call reads once."""
    gb_per_second: float | None = None
    """`bytes` in `seconds`."""
    share: float | None = None
    """Of what an elementwise kernel moves, read and written."""
    ceiling: float | None = None
    """What that kernel moves, in GB/s."""
    error: float | None = None
    """max |y - exact| in standard deviations of the exact product, over a sample."""
    note: str = ""


def layers(models: str) -> list[Layer]:
    """ "llama-2-7b,llama-3-8b" -> what their blocks launch.

    Raises:
        SlimError: a part is no model.
    """
    found: list[Layer] = []
    for model in models.split(","):
        if model not in _WIDTHS:
            raise SlimError(f"model {model!r} is not one of {', '.join(_WIDTHS)}")
        hidden, between, narrow = _WIDTHS[model]
        found += [
            Layer(f"{model} gate+up", hidden, (between, between)),
            Layer(f"{model} down", between, (hidden,)),
            Layer(f"{model} q+k+v", hidden, (hidden, narrow, narrow)),
            Layer(f"{model} o", hidden, (hidden,)),
        ]
    return found


def bench_gpu(
    wanted: Sequence[Layer],
    M: Sequence[int] = ROWS,
    *,
    device: str = "cuda",
    copies: int = COPIES,
    budget: float | None = None,
    progress: Progress | None = None,
) -> Iterator[GpuRow]:
    """Rows for every layer, M and contender; bfloat16 comes first.

    Args:
        device: "cuda", or "cpu" with Triton's interpreter, where times mean nothing.
        copies: bytes that the copies of a contender's weights have together, at least.
        budget: seconds after which no further layer is begun.

    Raises:
        SlimError: there is no GPU.
    """
    check_device(device)
    began, ceiling = time.monotonic(), copy_speed(device)
    for done, layer in enumerate(wanted):
        if budget is not None and time.monotonic() - began > budget:
            for other in wanted[done:]:
                yield GpuRow(str(other), 0, FLOAT, note=f"not measured within {budget:.0f} seconds")
            return
        found = contenders(layer, device, copies)
        for place, m in enumerate(M):
            if progress is not None:
                progress((done + place / len(M)) / len(wanted), f"{layer} M={m}")
            with torch.no_grad():
                yield from _rows(layer, m, found, device, ceiling)
        del found


def check_device(device: str) -> None:
    """Refuse to go on without a GPU."""
    if device != "cpu" and not torch.cuda.is_available():
        raise SlimError("bench on cuda: torch sees no GPU here; run it on a machine with one")


def copy_speed(device: str, size: int = _COPIED) -> float:
    """GB/s that an elementwise kernel on `size` bytes reads and writes: `copy_` in a CUDA graph is
    a command to the driver, which an H200 runs at two thirds of that.
    """
    count = (size if device != "cpu" else 1 << 20) // 4
    source = torch.ones(count, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    times = seconds_of([lambda: torch.bitwise_not(source, out=target)], device)
    return 2 * source.nbytes / statistics.median(times) / 1e9


def _rows(
    layer: Layer, M: int, found: Sequence[Contender], device: str, ceiling: float
) -> Iterator[GpuRow]:
    draw = torch.Generator(device).manual_seed(M)
    x = torch.randn(M, layer.K, generator=draw, device=device).bfloat16()
    base = None
    for contender in found:
        row = GpuRow(str(layer), M, contender.name, contender.kernel(M))
        if M > contender.most:
            note = f"slow above {contender.most} rows of x, left out"
            yield replace(row, note=note)
            continue
        try:
            row = _measured(row, contender, layer, x, device)
        except (SlimError, RuntimeError, need("triton.runtime.errors").TritonError) as error:
            yield replace(row, note=f"{FAILED}: {str(error).strip().splitlines()[0]}")
            continue
        base = row.seconds if contender.name == FLOAT else base
        yield _compared(row, base, ceiling)


def _measured(row: GpuRow, contender: Contender, layer: Layer, x: Tensor, device: str) -> GpuRow:
    """The row with error and times, the error first."""
    calls = contender.bind(x)
    error = _checked(contender, layer, x, calls[0]())
    times = seconds_of(calls, device)
    first, median, third = statistics.quantiles(times, n=4)
    return replace(row, seconds=median, spread=third - first, bytes=contender.bytes, error=error)


def _compared(row: GpuRow, base: float | None, ceiling: float) -> GpuRow:
    """The row with its speed beside bfloat16's and the copy's."""
    assert row.seconds is not None and row.bytes is not None  # it was measured
    speed = row.bytes / row.seconds / 1e9
    return replace(
        row,
        speedup=None if base is None else base / row.seconds,
        gb_per_second=speed,
        share=speed / ceiling,
        ceiling=ceiling,
        note=f"slower than {FLOAT}" if base is not None and row.seconds > base else "",
    )


def _checked(contender: Contender, layer: Layer, x: Tensor, y: Tensor) -> float:
    rows, columns = (sample(*size).to(x.device) for size in ((len(x), 64), (layer.N,)))
    what = f"{contender.name} on {layer}, M={len(x)}"
    exact = contender.exact(x[rows].double())
    return product_error(what, y[rows][:, columns], exact, contender.limit)


def seconds_of(calls: Sequence[Callable[[], Any]], device: str) -> list[float]:
    """Seconds of a call: one for each replay of a CUDA graph of all of them, or, on a CPU, for
    each call.
    """
    if device == "cpu":
        return [_on_cpu(call) for call in (*calls, *calls)]
    graph = graph_of(calls)
    once = _replayed(graph)
    count = max(10, min(200, int(_SECONDS / once)))
    return [_replayed(graph) / len(calls) for _ in range(count)]


def graph_of(calls: Sequence[Callable[[], Any]]) -> Any:
    """A CUDA graph of calls one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what allocates and compiles does so now
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replayed(graph: Any) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _on_cpu(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compile_kernels(wanted: Sequence[Layer], M: Sequence[int], device: str) -> None:
    """Run every kernel of some layers once, which leaves them in Triton's cache."""
    for layer in wanted:
        for contender in contenders(layer, device, 0, ours_only=True):
            for m in M:
                x = torch.zeros(m, layer.K, dtype=torch.bfloat16, device=device)
                contender.bind(x)[0]()


def compile_in_parallel(
    wanted: Sequence[Layer], M: Sequence[int], processes: int, *, device: str = "cuda"
) -> list[str]:
    """`compile_kernels` of all layers, by several processes at a time: most of a run is this.

    Returns what failed. It fails again where it is measured, and is said there.
    """
    parts = [wanted[i::processes] for i in range(min(processes, len(wanted)))]
    rows = [m for m in M if m <= DECODE_ROWS]  # of each there is a kernel of its own
    with ProcessPoolExecutor(len(parts), multiprocessing.get_context("spawn")) as pool:
        work = [pool.submit(compile_kernels, part, rows, device) for part in parts]
        failures = [each.exception() for each in work]
    return [str(failure) for failure in failures if failure is not None]
