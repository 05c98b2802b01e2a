"""How fast this CPU runs the compressed linears of a program, beside the same ones in floats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from slimfx.bench_kernels import read_speed
from slimfx.errors import ArtifactError
from slimfx.latency import cpu, in_floats, measured
from slimfx.passes.compressed_linears import CompressedLinear, value_of
from slimfx.report_kernels import described, layer_of
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.inductor.direct import Sizes, bytes_read
from slimfx.runtime.interleave import form_of, why_not

_SLOWER = 1.05
"""Times as long as floats, from which on a linear is named."""
_NAMED = 3


@dataclass(frozen=True)
class Speed:
    """Linears of one shape that are stored alike, for one row of x."""

    linears: int
    shape: str
    """ "N x K"."""
    stored: str
    rank: int
    microseconds: float
    """Of one linear by itself, in the fastest of several calls."""
    in_floats: float
    """Microseconds that torch takes in the dtype of x."""
    share: float
    """Bytes that a call reads, by its seconds, of the fastest plain read of memory."""
    note: str = ""

    @property
    def speedup(self) -> float:
        """Times as fast as floats."""
        return self.in_floats / self.microseconds


@dataclass(frozen=True)
class Speeds:
    """What was measured, and where."""

    cpu: str
    threads: int
    gb_per_second: float
    """The fastest plain read of memory."""
    rows: tuple[Speed, ...]
    left: int
    """Compressed linears that no kernel takes, which torch runs in floats."""


def speeds_of(linears: Mapping[str, CompressedLinear]) -> Speeds:
    """Linears by layer, each kind measured on torch's threads, floats in the same rounds.

    Raises:
        SlimError: the kernels cannot be compiled.
        ArtifactError: a matrix has no size or no groups.
    """
    alike: dict[tuple[Sizes, torch.dtype, str], list[str]] = defaultdict(list)
    for name, linear in linears.items():
        dtype = value_of(linear.x).dtype
        known = dtype in (torch.float32, torch.bfloat16)
        if known and not any(why_not(*each) for each in linear.matrices()):
            alike[_sizes(name, linear), dtype, described(layer_of(linear))].append(name)
    floats = {(sizes, dtype): in_floats(sizes.N, sizes.K, dtype) for sizes, dtype, _ in alike}
    seconds = measured([*(sizes for sizes, _ in floats), *floats.values()])
    ceiling = read_speed()
    rows = tuple(
        _row(sizes, stored, names, (seconds[sizes], seconds[floats[sizes, dtype]]), ceiling)
        for (sizes, dtype, stored), names in alike.items()
    )
    left = len(linears) - sum(row.linears for row in rows)
    return Speeds(cpu(), torch.get_num_threads(), ceiling, rows, left)


def _row(
    sizes: Sizes, stored: str, names: Sequence[str], times: tuple[float, float], ceiling: float
) -> Speed:
    ours, plain = times
    notes = []
    if ours > _SLOWER * plain:
        others = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        notes.append(f"slower than floats for one row: {', '.join(names[:_NAMED])}{others}")
    if any(form.where == "bitmask" for form in sizes.forms):
        notes.append("timed as if half of the values stayed")
    return Speed(
        *(len(names), f"{sizes.N} x {sizes.K}", stored, sizes.rank, 1e6 * ours, 1e6 * plain),
        share=bytes_read(sizes) / ours / 1e9 / ceiling,
        note="; ".join(notes),
    )


def _sizes(name: str, linear: CompressedLinear) -> Sizes:
    matrices = linear.matrices()
    forms = tuple(Form(*form_of(*each)) for each in matrices)
    K = matrices[0][1]
    if min(linear.N, K, *(form.group for form in forms)) < 1:
        groups = [form.group for form in forms]
        raise ArtifactError(f"{name}: [{linear.N}, {K}] in groups of {groups} is no matrix")
    return Sizes(linear.N, K, linear.rank, forms)
