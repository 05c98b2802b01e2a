"""Tokens a second and memory of a Llama-shaped model on a GPU: bfloat16 beside compressed.

A step makes one token for each sequence of a batch and keeps no cache, as in `bench_model`: what is
measured is the stack of linears. Inductor compiles each variant for each batch, in one graph, and a
step is one CUDA graph of it. Weights are random.

On "cpu", in Triton's interpreter, programs run as they are: it would have to compile for a GPU.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from slimfx.bench_gpu import Progress, check_device, copy_speed, graph_of, seconds_of
from slimfx.bench_model import Logits, compressed_sites
from slimfx.capture import capture
from slimfx.errors import SlimError, need
from slimfx.gpu_contenders import random_linear
from slimfx.passes.base import input_specs, lifted_tensor
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
_ATTENTION = "sdpa_without_mask"
"""A token has itself alone to attend to. Traced, transformers makes masks for "sdpa" even so, and
none for a name that it knows no masks of."""


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
    seconds: float = 0.0
    """Of a step: median."""
    share: float = 0.0
    """Of what a plain copy moves, what a step reads of weights: all but the embedding."""


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
        speed = 1e9 * copy_speed(device)
        tell(0.0, "bfloat16")
        program = _program(size, max(batches), device)
        for batch in batches:
            row = _measured("bfloat16", program, batch, device, speed)
            base[batch] = row.tokens_per_second
            yield row
        tell(0.5, "compressed")
        small, left = _compressed(program, gpu, device)
        del program  # and its weights, before memory is looked at
        for batch in batches:
            yield _measured("compressed", small, batch, device, speed, base[batch], left)


def _program(size: str, most: int, device: str) -> ExportedProgram:
    """The model as a program of one step for up to `most` sequences, made on the device."""
    transformers = need("transformers")
    hidden, between, layers, heads, keys = SIZES[size]
    config = transformers.LlamaConfig(
        **{"hidden_size": hidden, "intermediate_size": between, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": 32000},
    )
    kinds = transformers.AttentionInterface()
    kinds.register(_ATTENTION, kinds["sdpa"])
    config._attn_implementation = _ATTENTION
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
    copied: float,
    base: float | None = None,
    left: int = 0,
) -> GpuModelRow:
    """The row of a batch; `copied` is what a plain copy moves, in bytes a second."""
    held = {t.data_ptr(): t.nbytes for t in program.state_dict.values()}
    read = sum(held.values()) - _embedding(program)
    step = step_of(program, batch, compiled=device != "cpu")
    allocated = 0
    if device != "cpu":
        step()  # what is compiled and measured at first is no part of a step's memory
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream that there was
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, note = _times(step, device)
    if device != "cpu":
        allocated = torch.cuda.max_memory_allocated()
    median = statistics.median(times)
    first, _, third = statistics.quantiles(times, n=4)
    speed = batch / median
    return GpuModelRow(
        *(name, batch, speed, (third - first) / median, speed / (base or speed)),
        *(sum(held.values()), allocated, left, note),
        seconds=median,
        share=read / median / copied,
    )


def _embedding(program: ExportedProgram) -> int:
    """Bytes of the one weight of which a step reads a row for each token alone."""
    [name] = (name for name in program.state_dict if name.endswith("embed_tokens.weight"))
    return program.state_dict[name].nbytes


@torch.no_grad()
def step_of(program: ExportedProgram, batch: int, *, compiled: bool) -> Callable[[], Any]:
    """A step of `batch` sequences, by Inductor for them alone if `compiled`.

    What `torch.compile` makes of it but for Dynamo, which finds again, slowly, the graph that a
    program is.
    """
    device = next(iter(program.state_dict.values())).device
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    if not compiled:
        module = program.module()
        return lambda: module(input_ids=tokens)
    from slimfx.runtime.inductor import compile_graph  # loads the compiler, slow

    specs = input_specs(program)
    inputs = [
        tokens
        if specs[node.name].kind is InputKind.USER_INPUT
        else lifted_tensor(program, specs[node.name])
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]
    fake = FakeTensorMode()  # of no shape environment: every size is a number
    run = compile_graph(program.graph_module, [fake.from_tensor(each) for each in inputs])
    return lambda: run(*inputs)[0]


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
