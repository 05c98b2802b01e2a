"""Compile Triton kernels for GPUs that are not here, and count what their machine code does."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

Run = Callable[..., Any]
"""The fixture `run`."""
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
STORED = {
    **{"words": "*i32", "places": "*i16"},
    **{"values": "*i32", "mask": "*i32", "rows": "*i64", "blocks": "*i32"},
}
"""Types of what a portable kernel reads of its weight: 2:4 and dense, and bitmask."""
INT = (
    *("LOP", "SHF", "SHL", "SHR", "PRMT", "IADD", "IMAD", "LEA", "ISETP", "SEL", "IMNMX", "BMSK"),
    *("I2F", "F2I", "I2I", "IABS", "SGXT", "FLO", "POPC", "PLOP", "VIADD", "VIMNMX", "LEPC"),
)
"""Opcodes that compute with integers or bits, those of the uniform datapath left out."""
EXCHANGE = ("STS", "LDS", "LDSM", "STSM", "MOVM", "SHFL", "BAR")
"""Opcodes by which threads give each other data: what a change of layout costs."""


def compile(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    *,
    warps: int = 4,
    stages: int = 3,
    multiples: tuple[str, ...] = (),
    unaligned: tuple[str, ...] = (),
) -> Any:
    """A `@triton.jit` kernel compiled for one of `TARGETS`, as a launch there would compile it.

    Args:
        signature: type of each argument, such as "*bf16" or "i32", in order, constants left out.
        constants: the values of its `tl.constexpr` arguments.
        multiples: integer arguments that are multiples of 16.
        unaligned: pointers that are not; all others are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    pointers = {name for name in names if types[name].startswith("*")}
    aligned = [n for n in names if n in (pointers | set(multiples)) - set(unaligned)]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def to(device: str, weight: Any) -> Any:
    """A dataclass with its tensors on a device."""
    tensors = {name: value for name, value in vars(weight).items() if isinstance(value, Tensor)}
    return replace(weight, **{name: tensor.to(device) for name, tensor in tensors.items()})


def portable(
    kernel: Any, stored: Mapping[str, str], target: str, *, low: int | None = None, **own: Any
) -> Any:
    """A portable kernel for bfloat16 x, as `portable.product` launches it.

    Args:
        stored: type of each of the weight's tensors.
        low: inputs of R that share a scale, if there are adapters.
        own: constants, BM and GROUP among them.
    """
    from slimfx.runtime.kernels.portable import tl

    types = {**dict.fromkeys(("x", "scale", "bias", "y", "z", "R_scale"), "*bf16"), "R": "*i32"}
    numbers = ("M", "N", "K", "steps", "scale_row", "rank", "z_row", "R_scale_row", "N1", "N2")
    types |= {**dict.fromkeys((*numbers, "N3"), "i32"), **stored}
    adapters = {"LOW": low is not None, "R_GROUP": low or 0, "R_BK": low or 128}
    constants = {"HALF": tl.bfloat16, "BIAS": True, "PRMT": target != "gfx942", "BN": 64}
    constants |= {"BK": own["GROUP"] or 128, **adapters, **own}
    given = {"stages": 1 if target == "gfx942" else 3, "multiples": ("N", "K", "rank", "z_row")}
    return compile(kernel, types, constants, target, **given)


@dataclass(frozen=True)
class Sass:
    """Opcodes of a kernel's machine code in order, and those of each of its innermost loops."""

    opcodes: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]
    text: str

    @property
    def loop(self) -> tuple[str, ...]:
        """The largest of the loops; nothing if ptxas unrolled all of them."""
        return max(self.loops, key=len, default=())

    def loop_with(self, start: str) -> tuple[str, ...]:
        """The largest of the loops in which an opcode occurs, as `count` finds it."""
        return max((loop for loop in self.loops if count(loop, start)), key=len, default=())

    @property
    def spills(self) -> int:
        """Accesses of local memory."""
        return count(self.opcodes, "STL", "LDL")


def count(opcodes: tuple[str, ...], *starts: str) -> int:
    """How many opcodes begin with one of these: "HMMA.SP", "LDG.E.128"; modifiers may lie
    between them.
    """
    wanted = [start.split(".") for start in starts]
    return sum(
        any(op[0].startswith(want[0]) and set(want[1:]) <= set(op[1:]) for want in wanted)
        for op in (opcode.split(".") for opcode in opcodes)
    )


@cache
def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def sass(compiled: Any) -> Sass:
    """The machine code of a kernel compiled for an NVIDIA target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    opcodes, labels, jumps = [], {}, []
    for line in text.splitlines():
        label = re.match(r"(\.L_\w+):", line)
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if label:
            labels[label[1]] = len(opcodes)
        if code:
            back = re.search(r"BRA.*?`\((\.L_\w+)\)", line)
            if back and back[1] in labels:
                jumps.append((labels[back[1]], len(opcodes) + 1))
            opcodes.append(code[2])
    inner = [a for a in jumps if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in jumps)]
    loops = [tuple(opcodes[start:end]) for start, end in inner if end - start > 1]  # no trap
    return Sass(tuple(opcodes), tuple(loops), text)


def runs(compiled: Any) -> list[tuple[str, int]]:
    """Of each access to a tensor [..., m]: what it is, and bytes that a warp touches side by side
    along its last axis.
    """
    text = compiled.asm["ttgir"]
    layouts = {}
    for name, *parts in re.findall(
        r"(#\w+) = #ttg.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\], "
        r"warpsPerCTA = \[[\d, ]+\], order = \[([\d, ]+)\]",
        text,
    ):
        layouts[name] = [[int(n) for n in part.split(", ")] for part in parts]
    found = []
    for kind, shape, bits, name in re.findall(
        r"(tt\.load|tt\.store) .*tensor<(\d+(?:x\d+)+)x!tt.ptr<[a-z]+(\d+)>, (#\w+)>", text
    ):
        each, threads, order = layouts[name]
        width = int(shape.split("x")[-1])
        side = each[-1] * (threads[-1] if order[0] == len(order) - 1 else 1)
        found.append((f"{kind} {shape}", min(side, width) * int(bits) // 8))
    return found


def programs(compiled: Any, warps: int) -> int:
    """How many programs a multiprocessor of sm_80 or sm_90 has registers for at once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", text)
    assert found is not None, text
    return min(65536 // (-(-int(found[1]) // 8) * 256), 64) // warps


def per_weight(code: Sass, weights: int, of: Callable[[tuple[str, ...]], int] = len) -> float:
    """Instructions of the loop for each of the dense weights that a thread takes in a turn."""
    return of(code.loop) / weights
