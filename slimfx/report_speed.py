"""How fast this CPU runs the compressed linears of a program, beside the same ones in floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from slimfx.bench_kernels import read_speed
from slimfx.latency import in_floats, measured
from slimfx.passes.compressed_linears import CompressedLinear, value_of
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.inductor.direct import Sizes, bytes_read
from slimfx.runtime.interleave import form_of, why_not


@dataclass(frozen=True)
class Speed:
    """Linears of one shape that are stored alike, for one row of x."""

    linears: int
    shape: str
    """ "N x K"."""
    stored: str
    rank: int
    microseconds: float
    """Of one linear, in the fastest of several calls; its weight comes from memory."""
    in_floats: float
    """Microseconds that torch takes in the dtype of x."""
    speedup: float
    share: float
    """Bytes that a call reads, by its seconds, of the fastest plain read of memory."""
    note: str = ""


def speeds_of(linears: Mapping[str, CompressedLinear]) -> tuple[Speed, ...]:
    """Those that the kernels of compiled programs take, each measured by itself on the threads that
    torch has, beside floats in the same rounds.

    Raises:
        RuntimeError: the compiler failed.
    """
    alike = Counter(
        (_sizes(linear), value_of(linear.x).dtype)
        for linear in linears.values()
        if not any(why_not(*each) for each in linear.matrices())
    )
    if not alike:
        return ()
    floats = {each: in_floats(each[0].N, each[0].K, each[1]) for each in alike}
    seconds = measured([*(sizes for sizes, _ in alike), *floats.values()])
    ceiling = 1e9 * read_speed()
    rows = []
    for (sizes, dtype), count in alike.items():
        ours, plain = seconds[sizes], seconds[floats[sizes, dtype]]
        stored = ", ".join(dict.fromkeys(f"{form.where} {form.bits} bits" for form in sizes.forms))
        share = bytes_read(sizes) / ours / ceiling
        slower = f"slower than {dtype}: a recipe that skips these is faster here"
        rows.append(
            Speed(
                *(count, f"{sizes.N} x {sizes.K}", stored, sizes.rank),
                *(1e6 * ours, 1e6 * plain, plain / ours, share),
                slower if ours > plain else "",
            )
        )
    return tuple(rows)


def _sizes(linear: CompressedLinear) -> Sizes:
    matrices = linear.matrices()
    forms = tuple(Form(*form_of(*each)) for each in matrices)
    return Sizes(linear.N, matrices[0][1], linear.rank, forms)
