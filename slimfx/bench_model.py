"""How fast a whole language model is and what memory it takes: floats beside compressed.

A step makes one token for each sequence of a batch and keeps no cache: what is measured is the
stack of linears, whose weights every step reads. Compressed weights are random numbers in the
layout of a recipe's: speed and memory do not depend on the values. Each variant is compiled into a
package by one process and run by another, which holds what a user's would.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from slimfx.capture import capture
from slimfx.errors import SlimError, need
from slimfx.passes.find_linears import Site, find_linears
from slimfx.passes.replace_linears import replace_linears
from slimfx.passes.replace_tables import find_tables, replace_tables
from slimfx.recipe import Recipe
from slimfx.runtime.pack import Packed24, PackedDense, PackedLinear
from slimfx.runtime.targets import aoti

Progress = Callable[[float, str], None]
VARIANTS = ("float32", "bfloat16", "compressed", "compressed, int8 inputs", "all compressed")
"""The last one has head and embeddings in eight bits, too."""
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
}
"""Llama-shaped models: heads of 64, a key for four queries, 32000 words."""
_GROUP = 128
_MOST_ROWS = 4096
_ASCENDING = (4, 8, 9, 12, 13, 14)
"""The pairs of positions in four, as `pack_24` stores them."""


@dataclass(frozen=True)
class ModelRow:
    """One variant of a model."""

    name: str
    one: float
    """Tokens a second of one sequence: median."""
    one_spread: float
    """Of the seconds of a step: third quartile less first, in shares of the median."""
    many: float
    """Tokens a second of a batch of sequences, all of them together."""
    linear_bytes: int
    """Of the weights of linears that the recipe compresses, adapters and scales included."""
    weight_bytes: int
    """Of all parameters and buffers."""
    resident: int
    """Bytes that a process with the package holds after it made tokens one by one, torch and
    slimfx included."""
    peak: int
    """The most that it held until then."""


def bench_model(
    model: str | None = None,
    *,
    size: str = "1b",
    tokens: int = 16,
    batch: int = 64,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[ModelRow, ...]:
    """A row for each of `VARIANTS`.

    Args:
        model: a Hugging Face folder of a causal language model; None makes one of `size`.
        tokens: steps to measure.
        batch: sequences of the batch.

    Raises:
        SlimError: unknown size, or a variant's process failed.
    """
    if model is None and size not in SIZES:
        raise SlimError(f"size {size!r} is not one of {', '.join(SIZES)}")
    rows = []
    for i, name in enumerate(VARIANTS):
        tell = progress or (lambda share, what: None)
        tell(i / len(VARIANTS), f"{name}: compile")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.pt2")
            weights = _ask(name, "print_weights", name, model, size, threads, path)
            tell((i + 0.5) / len(VARIANTS), f"{name}: run")
            speed = _ask(name, "print_speed", path, tokens, batch, threads)
        rows.append(ModelRow(name=name, **weights, **speed))
    return tuple(rows)


def _ask(name: str, function: str, *asked: Any) -> dict[str, Any]:
    """What a function of this module prints in a process of its own."""
    command = f"import sys, slimfx.bench_model as b; b.{function}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", command, json.dumps(asked)], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SlimError(f"bench model: {name} failed: {last}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def print_weights(asked: str) -> None:
    """Compile a variant into a package and print the bytes of its weights as JSON."""
    name, model, size, threads, path = json.loads(asked)
    if threads is not None:
        torch.set_num_threads(threads)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    made, tokens = Logits(_model(model, size, dtype)), torch.zeros(2, 1, dtype=torch.int64)
    rows = {0: Dim("batch", min=1, max=_MOST_ROWS)}
    program = capture(made, {"input_ids": tokens}, dynamic_shapes={"input_ids": rows})
    del made
    chosen = compressed_sites(program)
    linear_bytes = sum(program.state_dict[site.fqn].nbytes for site in chosen)
    if "compressed" in name:
        packed = {site.name: _random(site, i) for i, site in enumerate(chosen)}
        linear_bytes = sum(map(_bytes, packed.values()))
        program = replace_linears(program, chosen, packed)
    if name == "all compressed":
        rest = [site for site in find_linears(program) if not site.other_readers]
        heads = {site.name: PackedLinear(_eight_bits(*_shape(site)), None, None) for site in rest}
        tables = {table.fqn: _eight_bits(*table.shape) for table in find_tables(program)}
        program = replace_tables(replace_linears(program, rest, heads), tables)
    rounded = name.endswith("int8 inputs")
    aoti.save(program, path, accuracy="int8-activations" if rounded else "exact")
    held = {tensor.data_ptr(): tensor.nbytes for tensor in program.state_dict.values()}
    print(json.dumps({"linear_bytes": linear_bytes, "weight_bytes": sum(held.values())}))


def print_speed(asked: str) -> None:
    """Run a package and print its speed and memory as JSON."""
    path, tokens, batch, threads = json.loads(asked)
    if threads is not None:
        torch.set_num_threads(threads)
    run = aoti.load(path)
    seconds = _seconds(run, 1, tokens)
    middle = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [middle] * 3
    memory = {"resident": _memory("VmRSS"), "peak": _memory("VmHWM")}
    speed = {
        "one": 1 / middle,
        "one_spread": (quartiles[2] - quartiles[0]) / middle,
        "many": batch / statistics.median(_seconds(run, batch, max(3, tokens // 4))),
    }
    print(json.dumps(speed | memory))


class Logits(nn.Module):
    """A causal language model without its cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, S, vocabulary] for [batch, S]."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def _model(model: str | None, size: str, dtype: torch.dtype) -> nn.Module:
    transformers = need("transformers")
    if model is not None:
        if not Path(model).is_dir():
            raise SlimError(f"{model}: no such folder")
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    sizes = SIZES[size]
    heads = sizes["hidden_size"] // 64
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=heads // 4, vocab_size=32000
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def compressed_sites(program: ExportedProgram) -> list[Site]:
    """The linears that the default recipe compresses."""
    recipe = Recipe()
    return [
        site
        for site in find_linears(program)
        if recipe.for_layer(site.name) is not None
        and not site.other_readers
        and site.in_features % 8 == 0
    ]


def _random(site: Site, seed: int) -> PackedLinear:
    """2:4 int4 with one scale, and int4 adapters of a tenth of the rank in groups of 128."""
    draw = torch.Generator().manual_seed(seed)
    N, K = site.out_features, site.in_features
    rank = max(1, min(N, K) // 10)

    def bytes_(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)

    def adapter(rows: int, columns: int) -> PackedDense:
        scale = torch.full((rows, -(-columns // _GROUP)), 1e-3, dtype=torch.bfloat16)
        return PackedDense(bytes_(rows, -(-columns // 2)), scale, 4, _GROUP)

    pairs = torch.tensor(_ASCENDING, dtype=torch.uint8)[bytes_(2, N, K // 8).long() % 6]
    weight = Packed24(
        values=bytes_(N, K // 4),
        indices=pairs[0] | (pairs[1] << 4),
        scale=torch.full((1, 1), 1e-3, dtype=torch.bfloat16),
        bits=4,
        group=K,
    )
    return PackedLinear(weight=weight, L=adapter(rank, K), R=adapter(N, rank))


def _shape(site: Site) -> tuple[int, int]:
    return site.out_features, site.in_features


def _eight_bits(N: int, K: int) -> PackedDense:
    """Codes of eight bits with a scale for each of N rows."""
    draw = torch.Generator().manual_seed(N)
    codes = torch.randint(0, 256, (N, K), dtype=torch.uint8, generator=draw)
    return PackedDense(codes, torch.full((N, 1), 1e-3, dtype=torch.bfloat16), 8, K)


def _bytes(packed: PackedLinear) -> int:
    tensors = [
        value
        for matrix in (packed.weight, packed.L, packed.R)
        for value in vars(matrix).values()
        if isinstance(value, Tensor)
    ]
    return sum(tensor.nbytes for tensor in tensors)


def _seconds(run: Callable[..., Any], batch: int, steps: int) -> list[float]:
    """Seconds of each step, the first two left out."""
    found = []
    for i in range(steps + 2):
        tokens = torch.full((batch, 1), i % 7, dtype=torch.int64)
        began = time.perf_counter()
        run(input_ids=tokens)
        found.append(time.perf_counter() - began)
    return found[2:]


def _memory(what: str) -> int:
    """Bytes of this process as Linux counts them; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(what)]
    return found[0] if found else 0
