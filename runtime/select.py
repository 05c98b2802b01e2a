"""Which kernel multiplies by a compressed weight on a GPU, and why no other one does.

    rows of x     NVIDIA from sm_80 on                  any other GPU
    1 to 64       decode_24, decode_int4                portable_24, portable_int4, bitmask
    65 to 160     portable_24, portable_int4, bitmask   the same
    more          expand, then the library's product    the same

On sm_90 portable kernels come first from 33 rows on; they do not take codes of less than four bits.
What no row of the table takes, such as codes of eight bits, is expanded for any number of rows.
From 1024 rows on, 2:4 codes of four bits are expanded without their zeros, where cuSPARSELt takes
them: `expand_cslt.why_not`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

KERNELS = ("decode_24", "decode_int4", "portable_24", "portable_int4", "bitmask", "expand")
"""In the order in which they are preferred."""
LAYOUTS = {name: "fragments" if name.startswith("decode") else "stored" for name in KERNELS}
"""Kernel -> the layout of a weight that it reads."""
WHERE = ("dense", "2:4", "bitmask", "floats")
"""Where the values of a matrix are; ops know the place in this tuple."""
DECODE_ROWS = 64
"""What the decode kernels have registers for."""
FEW_ROWS = 32
"""Above it a decode kernel takes as long as for 64, where an H200, whose warps multiply in groups
of four, was faster with portable_24: 59, 33, 34 and 16 microseconds beside 65, 42, 37 and 23 for
the weights of a block of Llama 2 7B (examples/results: gpu-h200.json, call 1, and
gpu-h200-kernels.json). Dense weights and adapters are taken to be alike; they were not measured.
"""
PORTABLE_ROWS = 160
"""Above it a weight that is expanded once costs less than one expanded in blocks: where the lines
through 64 and 256 rows meet for the layers of Llama 2 7B on an H200, 158 to 171
(examples/results/gpu-h200.json, call 1)."""
SPARSE_ROWS = 1024
"""From here on cuSPARSELt and its smaller expansion cost no more than cuBLAS and its own: 702 and
707 microseconds for the layers of a block of Llama 2 7B on an H200; at 512 rows 548 and 435
(examples/results/gpu-h200.json, call 2).
"""
TAKES = {
    **{"decode_24": "2:4", "decode_int4": "dense"},
    **{"portable_24": "2:4", "portable_int4": "dense", "bitmask": "bitmask"},
}
"""Kernel -> where the values of the weights that it reads are; expand reads any."""
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Gpu:
    """A GPU as Triton names it: "cuda" with 90 for sm_90, "hip" with "gfx942"."""

    backend: str
    arch: int | str


_HOPPER = Gpu("cuda", 90)
_ABOVE_FEW = (*KERNELS[2:-1], *KERNELS[:2], KERNELS[-1])
"""The order on Hopper above `FEW_ROWS`."""


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a device of torch is."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Gpu("hip", properties.gcnArchName.partition(":")[0])
    return Gpu("cuda", 10 * properties.major + properties.minor)


@dataclass(frozen=True)
class Form:
    """How a matrix is stored: one of `WHERE`, bits of a value, inputs that share a scale (0 if all
    of a row do).
    """

    where: str
    bits: int
    group: int

    def numbers(self) -> list[int]:
        """As an op takes it."""
        return [WHERE.index(self.where), self.bits, self.group]

    def __str__(self) -> str:
        kind = "floats" if self.where == "floats" else f"{self.where} values"
        return f"{kind} of {self.bits} bits"


@dataclass(frozen=True)
class Layer:
    """A compressed linear: its weight, its adapters if it has them, and the dtype of x."""

    weight: Form
    adapters: tuple[Form, ...] = ()
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Choice:
    """The kernel for `rows` of x, first and last, or None where there is no kernel at all; for
    every other one a sentence that says why not.
    """

    kernel: str | None
    why_not: Mapping[str, str]
    rows: tuple[int, int]


def select(
    layer: Layer, M: int, gpu: Gpu, *, layouts: Sequence[str] = ("fragments", "stored")
) -> Choice:
    """The kernel for M rows of x.

    Args:
        layouts: those of the weight that there are.
    """
    found = {name: _why_not(name, layer, M, gpu, layouts) for name in KERNELS}
    order = _ABOVE_FEW if gpu == _HOPPER and M > FEW_ROWS else KERNELS
    chosen = next((name for name in order if found[name] is None), None)
    preferred = f"{chosen} is faster for {M} rows of x"
    reasons = {name: why or preferred for name, why in found.items() if name != chosen}
    return Choice(chosen, reasons, (M, M))


def stretches(
    layer: Layer,
    low: int,
    high: int,
    gpu: Gpu,
    *,
    layouts: Sequence[str] = ("fragments", "stored"),
) -> tuple[Choice, ...]:
    """The kernels for low to high rows of x, with the rows that each one is for."""
    ends = (FEW_ROWS, DECODE_ROWS, PORTABLE_ROWS)
    firsts = [low] + [M + 1 for M in ends if low <= M < high]
    found: list[Choice] = []
    for first, last in zip(firsts, [M - 1 for M in firsts[1:]] + [high]):
        choice = select(layer, first, gpu, layouts=layouts)
        if found and found[-1].kernel == choice.kernel:
            choice = Choice(choice.kernel, found[-1].why_not, (found.pop().rows[0], last))
        found.append(Choice(choice.kernel, choice.why_not, (choice.rows[0], last)))
    return tuple(found)


def _why_not(name: str, layer: Layer, M: int, gpu: Gpu, layouts: Sequence[str]) -> str | None:
    """The first reason against a kernel."""
    if LAYOUTS[name] not in layouts:
        return f"the weight was not laid out for it: there is only {' and '.join(layouts)}"
    asked: list[Callable[[], str | None]] = [lambda: _why_not_layer(name, layer)]
    if name.startswith("decode"):
        asked += [lambda: _why_not_gpu(gpu), lambda: _why_not_decode(layer, M)]
    elif name != "expand" and M > PORTABLE_ROWS:
        asked.append(
            lambda: f"above {PORTABLE_ROWS} rows of x it is faster to expand the weight once"
        )
    return next((why for ask in asked if (why := ask()) is not None), None)


def _why_not_layer(name: str, layer: Layer) -> str | None:
    """Why the numbers of a layer do not fit."""
    if layer.dtype not in _FLOATS:
        return f"x is {layer.dtype}, not bfloat16, float16 or float32"
    if name == "expand":
        return None
    if layer.weight.where != TAKES[name]:
        return f"the weight has {layer.weight}, not {TAKES[name]} ones"
    step = 16 if name.startswith("portable") else 32
    for form in (layer.weight, *layer.adapters):
        if form.where == "floats":  # adapters in floats are a product of the library's
            continue
        small = form.bits < 4 and name.startswith("decode")  # laid out as codes of four bits
        if form.bits != 4 and not small and not (name == "bitmask" and form.where == "bitmask"):
            return f"{form}, and it reads 4"
        if form.group % step:
            return f"groups of {form.group} inputs, not a multiple of {step}"
    return None


def _why_not_gpu(gpu: Gpu) -> str | None:
    if gpu.backend != "cuda":
        return f"{gpu.arch} has no mma.sp and mma.sync instructions"
    return None if int(gpu.arch) >= 80 else f"sm_{gpu.arch} is older than sm_80"


def _why_not_decode(layer: Layer, M: int) -> str | None:
    if layer.dtype is not torch.bfloat16:
        return f"x is {layer.dtype}, not bfloat16"
    if M > DECODE_ROWS:
        return f"x has {M} rows, more than {DECODE_ROWS}"
    odd = [form for form in layer.adapters if form.where not in ("dense", "floats")]
    return f"an adapter has {odd[0]}, not dense ones" if odd else None
