"""Which kernels run the compressed linears of a program on CPUs and GPUs, and why no others do."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Node

from slimfx.passes.base import input_specs, reader
from slimfx.passes.compressed_linears import CompressedLinear, compressed_linears, value_of
from slimfx.passes.find_linears import PREFIX
from slimfx.runtime import gpu_layout, interleave, select

GPUS = {
    "NVIDIA sm_90": select.Gpu("cuda", 90),
    "other NVIDIA from sm_80 on": select.Gpu("cuda", 80),
    "AMD gfx942": select.Gpu("hip", "gfx942"),
}


@dataclass(frozen=True)
class Kernel:
    """What runs all linears that are stored alike."""

    linears: int
    stored: str
    device: str
    rows: str
    """Of x."""
    kernel: str
    why_not: str
    """The reasons against what would be preferred to it; "" where nothing would."""


def linears_of(program: ExportedProgram) -> dict[str, CompressedLinear]:
    """Layer -> its compressed linear; the ATen form, whose ops are written out, has none."""
    specs, found = input_specs(program), {}
    for linear in compressed_linears(program.graph, reader(program)):
        placeholder = linear.base.args[1]
        assert isinstance(placeholder, Node)
        layer, _, _ = str(specs[placeholder.name].target).rpartition(f".{PREFIX}")
        found[layer] = linear
    return found


def kernels_of(linears: Mapping[str, CompressedLinear]) -> tuple[Kernel, ...]:
    """For each way of storing a linear, the kernels of every device."""
    alike = Counter(_stored(linear) for linear in linears.values())
    return tuple(
        Kernel(count, described(stored.layer), *row)
        for stored, count in alike.items()
        for row in _rows(stored)
    )


@dataclass(frozen=True)
class _Stored:
    """What the choice depends on; the reasons are those that hold for any number of rows."""

    layer: select.Layer
    no_cpu: str | None
    no_gpu: str | None


def layer_of(linear: CompressedLinear) -> select.Layer:
    """How a linear is stored."""
    first, *adapters = (gpu_layout.form_of(*each) for each in linear.matrices())
    return select.Layer(first, tuple(adapters), value_of(linear.x).dtype)


def _stored(linear: CompressedLinear) -> _Stored:
    matrices = linear.matrices()
    reasons = [
        next((why for each in matrices if (why := why_not(*each))), None)
        for why_not in (interleave.why_not, gpu_layout.why_not)
    ]
    return _Stored(layer_of(linear), *reasons)


def _rows(stored: _Stored) -> Iterator[tuple[str, str, str, str]]:
    """Device, rows of x, kernel, why no other."""
    aten = "none; ATen"
    yield "CPU", "any", "linear_cpu" if stored.no_cpu is None else aten, stored.no_cpu or ""
    if stored.no_gpu is not None:
        yield "GPU", "any", aten, stored.no_gpu
        return
    for device, gpu in GPUS.items():
        for choice in select.stretches(stored.layer, 1, sys.maxsize, gpu):
            first, last = choice.rows
            span = f"{first} or more" if last == sys.maxsize else f"{first} to {last}"
            yield device, span, choice.kernel or aten, _against(choice, stored.layer.weight.where)


def _against(choice: select.Choice, where: str) -> str:
    """Why not the kernels that are preferred, of those for weights of this kind."""
    kernels = select.KERNELS
    better = kernels[: kernels.index(choice.kernel)] if choice.kernel else kernels
    own = [name for name in better if select.TAKES.get(name, where) == where]
    return "; ".join(f"{name}: {choice.why_not[name]}" for name in own)


def described(layer: select.Layer) -> str:
    """In words."""
    forms = [
        f"{form}{f' in groups of {form.group}' if form.group else ''}"
        for form in (layer.weight, *layer.adapters)
    ]
    L_R = f"; adapters: {', '.join(dict.fromkeys(forms[1:]))}" if layer.adapters else ""
    return f"{forms[0]}{L_R}; x {str(layer.dtype).removeprefix('torch.')}"
