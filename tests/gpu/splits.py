"""Every way to share a weight among programs, measured: what `mma.split_for` should say of a GPU.

.ci/gpu --links python3 $PWD/tests/gpu/splits.py llama-2-7b 1,16 [splits.json]
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from slimfx.runtime.fragments import Fragments
from slimfx.runtime.gpu_layout import form_of, lay_out, read_fragments
from slimfx.runtime.kernels.decode import decode_parts
from slimfx.runtime.kernels.mma import Split, split_for

from slimfx.bench_check import product_error, sample
from slimfx.bench_gpu import COPIES, layers, seconds_of
from slimfx.gpu_contenders import Layer, exact_product, matrices_of

LIMIT = 0.05
"""Of the error, in standard deviations of the product."""


@dataclass(frozen=True)
class Row:
    """One way, its microseconds, and whether it is what `split_for` says."""

    layer: str
    M: int
    split: tuple[int, int, int, int]
    microseconds: float
    chosen: bool


def splits(layer: Layer, M: int) -> list[Split]:
    """With 400 to 9000 warps, which is from a quarter of what an H100 holds to four times that."""
    turns, tiles = -(-layer.K // 256), -(-layer.N // 16)
    found = [split_for(layer.N, layer.K, M)]
    for each, warps, ahead, across in itertools.product((1, 2), (1, 2, 4, 8), (1, 2, 3), (1, 2)):
        if 400 <= tiles // each * warps <= 9000 and max(warps, ahead) <= turns:
            found.append(Split(each, warps, ahead, across))
    return list(dict.fromkeys(found))


def laid_out(layer: Layer, device: str, copies: int) -> tuple[list[list[Fragments]], object]:
    """W, L and R, in copies that have so many bytes together at least; x float64 -> y."""
    draw = torch.Generator(device).manual_seed(0)
    matrices = matrices_of(layer, draw, adapted=True)
    parts = len(layer.rows)
    sizes = [(layer.N, layer.K), (parts * layer.rank, layer.K), (layer.N, layer.rank)]
    tensors = [lay_out(matrix, K, "fragments") for matrix, K in matrices]
    size = sum(tensor.nbytes for pair in tensors for tensor in pair)
    found = []
    for _ in range(max(1, -(-copies // size))):
        held = [[tensor.clone() for tensor in pair] for pair in tensors]
        found.append(
            [
                read_fragments(pair, form_of(*matrix), *size)
                for pair, matrix, size in zip(held, matrices, sizes, strict=True)
            ]
        )
    return found, exact_product(layer, matrices, layer.rank)


def rows_of_x(layer: Layer, M: int, device: str) -> torch.Tensor:
    """Random."""
    draw = torch.Generator(device).manual_seed(M)
    return torch.randn(M, layer.K, generator=draw, device=device).bfloat16()


def compile_some(jobs: Sequence[tuple[Layer, int, Split]], device: str) -> None:
    """Run each once, which leaves it in Triton's cache."""
    made: dict[Layer, list[Fragments]] = {}
    for layer, M, split in jobs:
        if layer not in made:
            made[layer] = laid_out(layer, device, 0)[0][0]
        decode_parts(rows_of_x(layer, M, device), *made[layer], layer.rows, split=split)


def measured(device: str, wanted: Sequence[Layer], M: Sequence[int], copies: int) -> list[Row]:
    """All of them."""
    found = []
    for layer in wanted:
        sets, exact = laid_out(layer, device, copies)
        for m in M:
            x, picked = rows_of_x(layer, m, device), sample(layer.N).to(device)
            wanted_y = exact(x.double())
            for split in splits(layer, m):
                calls = [partial(decode_parts, x, *held, layer.rows, split=split) for held in sets]
                y = calls[0]()[:, picked]
                product_error(f"{split} on {layer}, M={m}", y, wanted_y, LIMIT)
                time = 1e6 * statistics.median(seconds_of(calls, device))
                shape = (split.tiles, split.warps, split.ahead, split.across)
                chosen = split == split_for(layer.N, layer.K, m)
                found.append(Row(str(layer), m, shape, time, chosen))
    return found


def main(models: str, M: str, output: str | None = None) -> None:
    """Compile in parallel, measure, and print the three fastest and the chosen one."""
    wanted, counts = layers(models), [int(m) for m in M.split(",")]
    jobs = [(layer, m, split) for layer in wanted for m in counts for split in splits(layer, m)]
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
            print(f"{layer:34} M={m:<4}{row.microseconds:8.2f} us  {row.split} {mark}")
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
