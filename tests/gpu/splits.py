"""Every way to share a weight among programs, measured: what `mma.split_for`, `portable.How` and
the rows of `select` should be on a GPU.

Decode kernels up to 64 rows, portable_24 from 32 rows on:

.ci/gpu --links python3 $PWD/tests/gpu/splits.py llama-2-7b 1,16,32,64 [splits.json]
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from slimfx.runtime.gpu_layout import form_of, lay_out, read_fragments, read_stored
from slimfx.runtime.kernels.decode import decode_parts
from slimfx.runtime.kernels.mma import Split, split_for
from slimfx.runtime.kernels.portable import How
from slimfx.runtime.kernels.portable_24 import portable_24
from slimfx.runtime.kernels.portable_int4 import low_of
from slimfx.runtime.select import DECODE_ROWS, FEW_ROWS

from slimfx.bench_check import product_error, sample
from slimfx.bench_gpu import COPIES, layers, seconds_of
from slimfx.gpu_contenders import Exact, Layer, exact_product, matrices_of

LIMIT = 0.05
"""Of the error, in standard deviations of the product."""
Way = Split | How
"""Of a decode kernel, or of portable_24."""
Matrices = Sequence[Any]
"""W, L and R as the kernels of one of them take them."""


@dataclass(frozen=True)
class Row:
    """One way, its numbers in order, its microseconds, and whether it is the kernels' own."""

    layer: str
    M: int
    kernel: str
    split: tuple[int | None, ...]
    microseconds: float
    chosen: bool


def ways(layer: Layer, M: int) -> list[Way]:
    """Those of both kernels, the own ones of each among them."""
    decode = list[Way](splits(layer, M)) if M <= DECODE_ROWS else []
    parts, stages = (None, 1, 2, 4, 8), (None, 2, 4)
    portable = [How(split, stages=n) for split in parts for n in stages] if M >= FEW_ROWS else []
    return [*decode, *portable]


def splits(layer: Layer, M: int) -> list[Split]:
    """With 400 to 9000 warps, which is from a quarter of what an H100 holds to four times that."""
    turns, tiles = -(-layer.K // 256), -(-layer.N // 16)
    found = [split_for(layer.N, layer.K, M)]
    for each, warps, ahead, across in itertools.product((1, 2), (1, 2, 4, 8), (1, 2, 3), (1, 2)):
        if 400 <= tiles // each * warps <= 9000 and max(warps, ahead) <= turns:
            found.append(Split(each, warps, ahead, across))
    return list(dict.fromkeys(found))


def laid_out(layer: Layer, device: str, copies: int, layout: str) -> tuple[list[Matrices], Exact]:
    """W, L and R, in copies that have so many bytes together at least; x float64 -> y."""
    draw = torch.Generator(device).manual_seed(0)
    matrices = matrices_of(layer, draw, adapted=True)
    parts = len(layer.rows)
    sizes = [(layer.N, layer.K), (parts * layer.rank, layer.K), (layer.N, layer.rank)]
    tensors = [lay_out(matrix, K, layout) for matrix, K in matrices]
    size = sum(tensor.nbytes for pair in tensors for tensor in pair)
    found: list[Matrices] = []
    for _ in range(max(1, -(-copies // size))):
        held = [[tensor.clone() for tensor in each] for each in tensors]
        read: list[Any] = []
        for each, matrix, (N, K) in zip(held, matrices, sizes, strict=True):
            form = form_of(*matrix)
            fragments = layout == "fragments"
            read.append(
                read_fragments(each, form, N, K) if fragments else read_stored(each, form, K)
            )
        found.append(read)
    return found, exact_product(layer, matrices, layer.rank)


def run(x: torch.Tensor, held: Matrices, layer: Layer, way: Way) -> torch.Tensor:
    """y of one way."""
    W, L, R = held
    if isinstance(way, Split):
        return decode_parts(x, W, L, R, layer.rows, split=way)
    return portable_24(x, W, how=way, low=low_of(x, L, R, layer.rows))


def rows_of_x(layer: Layer, M: int, device: str) -> torch.Tensor:
    """Random."""
    draw = torch.Generator(device).manual_seed(M)
    return torch.randn(M, layer.K, generator=draw, device=device).bfloat16()


def layout_of(way: Way) -> str:
    """That its kernel reads."""
    return "fragments" if isinstance(way, Split) else "stored"


def compile_some(jobs: Sequence[tuple[Layer, int, Way]], device: str) -> None:
    """Run each once, which leaves it in Triton's cache."""
    made: dict[tuple[Layer, str], Matrices] = {}
    for layer, M, way in jobs:
        key = layer, layout_of(way)
        if key not in made:
            made[key] = laid_out(layer, device, 0, key[1])[0][0]
        run(rows_of_x(layer, M, device), made[key], layer, way)


def measured(device: str, wanted: Sequence[Layer], M: Sequence[int], copies: int) -> list[Row]:
    """All of them."""
    found = []
    for layer, layout in itertools.product(wanted, ("fragments", "stored")):
        sets, exact = laid_out(layer, device, copies, layout)
        for m in M:
            x, picked = rows_of_x(layer, m, device), sample(layer.N).to(device)
            wanted_y = exact(x.double())
            for way in ways(layer, m):
                if layout_of(way) != layout:
                    continue
                calls = [partial(run, x, held, layer, way) for held in sets]
                y = calls[0]()[:, picked]
                product_error(f"{way} on {layer}, M={m}", y, wanted_y, LIMIT)
                time = 1e6 * statistics.median(seconds_of(calls, device))
                chosen = way in (split_for(layer.N, layer.K, m), How())
                kernel = "decode_24" if layout == "fragments" else "portable_24"
                shape = tuple(getattr(way, each.name) for each in fields(way))
                found.append(Row(str(layer), m, kernel, shape, time, chosen))
    return found


def main(models: str, M: str, output: str | None = None) -> None:
    """Compile in parallel, measure, and print the three fastest and the chosen one."""
    wanted, counts = layers(models), [int(m) for m in M.split(",")]
    jobs = [(layer, m, way) for layer in wanted for m in counts for way in ways(layer, m)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        shares = [jobs[i :: pool._max_workers] for i in range(pool._max_workers)]
        list(pool.map(partial(compile_some, device="cuda"), shares))
    rows = measured("cuda", wanted, counts, COPIES)
    for layer, m in dict.fromkeys((row.layer, row.M) for row in rows):
        here = sorted(
            (row for row in rows if (row.layer, row.M) == (layer, m)),
            key=lambda row: row.microseconds,
        )
        for row in [*here[:3], *(row for row in here[3:] if row.chosen)]:
            mark = "chosen" if row.chosen else ""
            name = f"{row.kernel} {row.split}"
            print(f"{layer:34} M={m:<4}{row.microseconds:8.2f} us  {name} {mark}")
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
