"""Tokens a second and memory of a Llama-shaped model on a GPU: bfloat16 beside compressed.

A step makes one token for each sequence of a batch and keeps no cache, as in `bench_model`: what is
measured is the stack of linears. Each step is one CUDA graph. Weights are random.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from slimfx.bench_gpu import Progress, check_device, graph_of, seconds_of
from slimfx.bench_model import Logits, compressed_sites
from slimfx.capture import capture
from slimfx.errors import SlimError, need
from slimfx.gpu_contenders import random_linear
from slimfx.passes.lower_gpu import lower_gpu
from slimfx.passes.replace_linears import replace_linears
from slimfx.runtime.select import Gpu, gpu_of

SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (256, 512, 2, 4, 2),
    "1b": (2048, 8192, 16, 32, 8),
    "7b": (4096, 11008, 32, 32, 32),
    "8b": (4096, 14336, 32, 32, 8),
}
"""Hidden and intermediate size, layers, heads, heads of keys: Llama-2-7B is 7b, Llama-3-8B 8b."""
_STEPS = 30


@dataclass(frozen=True)
class GpuModelRow:
    """One variant of a model with one batch."""

    name: str
    batch: int
    tokens_per_second: float
    """Of all sequences together: median of the steps."""
    spread: float
    """Of the seconds of a step: third quartile less first, in shares of the median."""
    speedup: float
    """Tokens a second divided by those of bfloat16 with this batch."""
    weight_bytes: int
    """Of all parameters and buffers."""
    allocated: int
    """What torch held at most while steps ran, weights and CUDA graph included."""
    left: int = 0
    """Compressed linears without a kernel."""
    note: str = ""


def bench_model_gpu(
    size: str = "7b",
    batches: tuple[int, ...] = (1, 16),
    *,
    device: str = "cuda",
    progress: Progress | None = None,
) -> Iterator[GpuModelRow]:
    """Rows for each batch, of bfloat16 first and then of compressed.

    Raises:
        SlimError: unknown size, or there is no GPU.
    """
    if size not in SIZES:
        raise SlimError(f"size {size!r} is not one of {', '.join(SIZES)}")
    check_device(device)
    tell = progress or (lambda share, what: None)
    gpu = gpu_of(torch.device(device)) if device != "cpu" else Gpu("cuda", 90)
    base: dict[int, float] = {}
    with torch.no_grad():
        tell(0.0, "bfloat16")
        program = _program(size, max(batches), device)
        for batch in batches:
            row = _measured("bfloat16", program, batch, device)
            base[batch] = row.tokens_per_second
            yield row
        tell(0.5, "compressed")
        small, left = _compressed(program, gpu, device)
        del program  # and its weights, before memory is looked at
        for batch in batches:
            yield _measured("compressed", small, batch, device, base[batch], left)


def _program(size: str, most: int, device: str) -> ExportedProgram:
    """The model as a program of one step for up to `most` sequences, made on the device."""
    transformers = need("transformers")
    hidden, between, layers, heads, keys = SIZES[size]
    config = transformers.LlamaConfig(
        **{"hidden_size": hidden, "intermediate_size": between, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": 32000},
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # or 7b would take 27 GB at first
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    tokens = torch.zeros(2, 1, dtype=torch.int64, device=device)
    rows = {0: Dim("batch", min=1, max=max(2, most))}
    return capture(Logits(model), {"input_ids": tokens}, dynamic_shapes={"input_ids": rows})


def _compressed(program: ExportedProgram, gpu: Gpu, device: str) -> tuple[ExportedProgram, int]:
    """The linears that the default recipe compresses as random ones of its form, lowered."""
    draw = torch.Generator(device).manual_seed(0)
    sites = compressed_sites(program)
    packed = {site.name: random_linear(site.out_features, site.in_features, draw) for site in sites}
    lowered, report = lower_gpu(replace_linears(program, sites, packed), gpu)
    return lowered, len(report.left)


def _measured(
    name: str,
    program: ExportedProgram,
    batch: int,
    device: str,
    base: float | None = None,
    left: int = 0,
) -> GpuModelRow:
    held = {t.data_ptr(): t.nbytes for t in program.state_dict.values()}
    run, tokens = program.module(), torch.zeros(batch, 1, dtype=torch.int64, device=device)
    gc.collect()
    allocated, note = 0, ""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step() -> Any:
        return run(input_ids=tokens)

    times, note = _times(step, device)
    if device != "cpu":
        allocated = torch.cuda.max_memory_allocated()
    median = statistics.median(times)
    first, _, third = statistics.quantiles(times, n=4)
    speed = batch / median
    return GpuModelRow(
        *(name, batch, speed, (third - first) / median, speed / (base or speed)),
        *(sum(held.values()), allocated, left, note),
    )


def _times(step: Callable[[], Any], device: str) -> tuple[list[float], str]:
    """Seconds of steps by a CUDA graph; where none can be made, of steps, and why."""
    if device == "cpu":
        return seconds_of([step], device), ""
    try:
        graph_of([step])
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        torch.cuda.synchronize()
        return _eager(step), f"no CUDA graph, steps one by one: {reason}"
    return seconds_of([step], device), ""


def _eager(step: Callable[[], Any]) -> list[float]:
    found = []
    for _ in range(_STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
        start.record()
        step()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return found
