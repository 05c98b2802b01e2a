"""How long a token takes in the linears of a program, from a table measured on this processor.

    seconds(program) ~ sum over linears of seconds(forms, N, K, rank)    for one row

The kernels are those of a compiled program (`slimfx export --to aoti`, the backend slim), float
linears are torch's. Weights are read from more memory than any cache holds. Each form and size is
measured once for a processor, a number of threads and a slimfx, and remembered (`remember`).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.functional import linear

from slimfx import remember
from slimfx.bench_kernels import COPIES, in_rounds
from slimfx.passes.find_linears import Site, find_linears
from slimfx.plan import adapter_layout, layout_of
from slimfx.recipe import Recipe
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.inductor.direct import Sizes, bytes_read, calls, memory
from slimfx.runtime.interleave import LANES, whole
from slimfx.steps import LayerRecipe

_SECONDS = 0.05
"""That each is called for, five rounds together."""
_FLOATS = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}


def latency(program: ExportedProgram, recipe: Recipe) -> float:
    """Seconds that all linears of a program take for one row under a recipe."""
    sites = find_linears(program)
    hows = [None if site.routes else recipe.for_layer(site.name) for site in sites]
    return sum(t for (t,) in latencies([(s, [how]) for s, how in zip(sites, hows, strict=True)]))


def latencies(linears: Iterable[tuple[Site, Sequence[LayerRecipe | None]]]) -> list[list[float]]:
    """Seconds of each linear under each of its recipes (None: in floats, as it is), for one row;
    infinite where no kernel reads what a recipe stores.
    """
    asked = [(site, [_sizes(site, how) for how in hows]) for site, hows in linears]
    known = table(one for _, each in asked for one in each if one is not None)
    return [
        [len(site.uses) * known[one] if one is not None else math.inf for one in each]
        for site, each in asked
    ]


def table(linears: Iterable[Sizes], *, copies: int = COPIES) -> dict[Sizes, float]:
    """Seconds of one row, each the fastest of several calls, which others on the machine disturb
    the least; those not yet known are measured.

    Args:
        copies: bytes of the memory that weights are read from.

    Raises:
        SlimError: the kernels cannot be compiled.
    """
    wanted = dict.fromkeys(linears)
    key = {"cpu": cpu(), "threads": torch.get_num_threads(), "copies": copies}
    known: dict[str, float] = remember.recall("latency", key) or {}
    missing = [each for each in wanted if str(each) not in known]
    if missing:
        known |= {str(each): taken for each, taken in measured(missing, copies=copies).items()}
        remember.keep("latency", key, known)
    return {each: known[str(each)] for each in wanted}


def measured(linears: Iterable[Sizes], *, copies: int = COPIES) -> dict[Sizes, float]:
    """As `table`, here and now."""
    wanted = list(dict.fromkeys(linears))
    pool = memory(max(copies, *map(_bytes, wanted)) if wanted else 0)
    with torch.no_grad():
        taken = in_rounds([_calls(each, pool) for each in wanted], _SECONDS)
    return {each: min(times) for each, times in zip(wanted, taken, strict=True)}


def in_floats(N: int, K: int, dtype: torch.dtype) -> Sizes:
    """A linear as torch has it."""
    return Sizes(N, K, 0, (Form("floats", 8 * dtype.itemsize, K),))


def _sizes(site: Site, how: LayerRecipe | None) -> Sizes | None:
    """What is measured for a linear; None if no kernel takes it."""
    N, K = site.out_features, site.in_features
    if how is None:
        return in_floats(N, K, site.dtype)
    layout, grouped = layout_of(how), how.quantize and how.quantize.granularity == "group"
    group = min(how.quantize.group, whole(K)) if how.quantize and grouped else whole(K)
    forms = [Form(layout.where, max(4, layout.bits), group)]
    rank = how.adapter.rank_for(N, K) if how.adapter else 0
    if how.adapter and rank:
        widths = (whole(K), whole(rank))
        groups = [min(how.adapter.group, w) if how.adapter.bits == 4 else w for w in widths]
        wheres = (adapter_layout(how.adapter).where, "dense")
        forms += [Form(w, how.adapter.bits, g) for w, g in zip(wheres, groups, strict=True)]
    return None if any(form.group % LANES for form in forms) else Sizes(N, K, rank, tuple(forms))


def _bytes(sizes: Sizes) -> int:
    """Of all that a call multiplies by."""
    weight = sizes.forms[0]
    return sizes.N * sizes.K * weight.bits // 8 if weight.where == "floats" else bytes_read(sizes)


def _calls(sizes: Sizes, pool: Tensor) -> Iterator[Callable[[], Any]]:
    if sizes.forms[0].where != "floats":
        return calls(sizes, pool)
    return _float_calls(sizes.N, sizes.K, pool.view(_FLOATS[sizes.forms[0].bits]))


def _float_calls(N: int, K: int, pool: Tensor) -> Iterator[Callable[[], Any]]:
    x = torch.ones(1, K, dtype=pool.dtype)
    while True:
        for start in range(0, pool.numel() - N * K + 1, N * K):
            yield partial(linear, x, pool[start : start + N * K].view(N, K))


def cpu() -> str:
    """The processor's name as Linux has it, else what Python knows, and what torch compiles for."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = next((line for line in lines if line.startswith("model name")), platform.processor())
    return f"{named.partition(':')[2].strip()} {torch.backends.cpu.get_cpu_capability()}"
