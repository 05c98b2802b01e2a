"""What scales of groups cost at run time: the same 2:4 int4 linears with ever smaller groups.

python examples/reproduce/groups.py -o groups.png        (needs g++)

A chain of linears compiled by Inductor with slimfx's kernels, its weights larger than most caches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import study
import torch
from matplotlib.figure import Figure
from torch import nn

import slimfx
from slimfx import show
from slimfx.recipe import Recipe
from slimfx.steps import Prune, Quantize


@dataclass(frozen=True)
class Row:
    """One size of groups at one number of rows of x."""

    group: int
    """Inputs that share a scale; 0: all weights of a layer do."""
    M: int
    seconds: float
    """Median of a call of the whole chain."""
    slowdown: float
    """Seconds over those of one scale a layer."""


def main(words: Sequence[str]) -> list[Row]:
    """A row for each group and M."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of a layer")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--groups", type=study.numbers, default=(0, 256, 128, 64, 32))
    parser.add_argument("--rows", type=study.numbers, default=(1, 16, 64))
    parser.add_argument("-o", "--output", type=Path, help="picture; its numbers go beside it")
    return _finished(parser.parse_args(words))


def _finished(args) -> list[Row]:  # type: ignore[no-untyped-def]
    groups, rows = (list(map(int, values)) for values in (args.groups, args.rows))
    return study.finish(_rows(args.size, args.layers, groups, rows), args.output, draw)


def _rows(size: int, layers: int, groups: Sequence[int], rows: Sequence[int]) -> Iterator[Row]:
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
    program = slimfx.capture(chain, (torch.randn(2, size),))
    base: dict[int, float] = {}
    with show.line("reproduce") as tell, tempfile.TemporaryDirectory() as folder:
        for i, group in enumerate(groups):
            tell(i / len(groups), f"groups of {group}" if group else "one scale")
            path = Path(folder) / f"{group}.pt2"
            small = slimfx.compress(program, _recipe(group), calibration=[torch.randn(8, size)])
            slimfx.export(small, "aoti", path)
            call = torch._inductor.aoti_load_package(str(path))
            for M in rows:
                seconds = _seconds(call, torch.randn(M, size))
                yield Row(group, M, seconds, seconds / base.setdefault(M, seconds))


def _recipe(group: int) -> Recipe:
    granularity = "group" if group else "tensor"
    quantize = Quantize("absmax", granularity=granularity, group=group or 128)
    return Recipe(Prune("magnitude"), quantize, adapter=None)


def _seconds(call, x: torch.Tensor) -> float:  # type: ignore[no-untyped-def]
    """Median of the calls of about a second, after one that is not counted."""
    call(x)
    taken: list[float] = []
    while sum(taken) < 1 or len(taken) < 5:
        began = time.perf_counter()
        call(x)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def draw(figure: Figure, rows: list[Row]) -> None:
    """Bars for each group, a colour for each number of rows."""
    axes = figure.subplots()
    groups = list(dict.fromkeys(row.group for row in rows))
    numbers = list(dict.fromkeys(row.M for row in rows))
    for i, M in enumerate(numbers):
        own = [row.slowdown for row in rows if row.M == M]
        width = 0.8 / len(numbers)
        axes.bar([at + i * width for at in range(len(groups))], own, width, label=f"{M} rows")
    axes.set_xticks(range(len(groups)), [str(group) if group else "tensor" for group in groups])
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xlabel("inputs that share a scale")
    axes.set_ylabel("time, relative to one scale a layer")
    axes.legend()


if __name__ == "__main__":
    study.run(main)
