"""Inline PTX under Triton's interpreter: every instruction as the PTX ISA defines it.

Triton's interpreter knows no inline assembly. `install` gives it this emulation, which parses the
very text that a kernel has and runs it register by register, a column for each thread. Threads
are the elements in row-major order, `pack` of them each, thirty-two to a warp: the order of a
tensor [32 warps, pack] whose layout is sizePerThread [1, pack], threadsPerWarp [32, 1].

Fragments of `mma` (lane = 4 g + t): the A register a_j holds row g + 8 (j % 2), columns 2 t and
2 t + 1, + 8 from a_2 on; b_j rows 2 t + 8 j and the next of column g; c_0, c_1 row g, columns 2 t
and 2 t + 1, c_2, c_3 row g + 8. `mma.sp` has the same A, of kept values. Metadata of selector f is
in lanes 4 g + 2 f + h: positions of columns 16 h to 16 h + 15, in the low half of row g, in the
high half of row g + 8, four bits for each four columns.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Register = NDArray[np.uint64]
"""The bits that a register has in each thread."""
_LANE = np.arange(32)
_G, _T = _LANE >> 2, _LANE & 3
_WIDTHS = {"h": 16, "r": 32, "f": 32, "l": 64, "d": 64}


def call(work: bytes) -> bytes:
    """Run a pickled function with its arguments, the emulation installed; its pickled result."""
    install()
    function, arguments = pickle.loads(work)
    return pickle.dumps(function(*arguments))


def install() -> None:
    """Teach this process's Triton interpreter inline assembly and bfloat16."""
    from triton.runtime import interpreter

    def create_inline_asm(
        self: Any, asm: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
    ) -> _Call:
        dtypes = [interpreter._get_np_dtype(ty) for ty in types]
        out = run(asm, constraints, [value.data for value in values], dtypes, pack)
        return _Call([interpreter.TensorHandle(a, ty.scalar) for a, ty in zip(out, types)])

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
    theirs = interpreter._convert_float
    if getattr(theirs, "rounds", False):
        return

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """Theirs cuts off, and loses the carry where it rounds; `cvt.rn.bf16.f32` does neither."""
        if (source.name, target.name) == ("fp32", "bf16"):
            return bf16_bits(data).astype(np.uint16)
        if (source.name, target.name) == ("bf16", "fp32"):  # theirs is wrong below 2^-126
            return floats(data.astype(np.uint64) << np.uint64(16))
        return theirs(data, source, target, mode)

    convert.rounds = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Theirs multiplies the bits of bfloat16 as if they were integers."""
        return dot(self, *(_as_float32(value, interpreter) for value in (a, b)), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _as_float32(value: Any, interpreter: Any) -> Any:
    """A bfloat16 value of the interpreter as float32; others as they are."""
    if value.dtype.scalar.name != "bf16":
        return value
    wide = floats(value.data.astype(np.uint64) << np.uint64(16))
    return interpreter.TensorHandle(wide, interpreter.tl.float32)


@dataclass(frozen=True)
class _Call:
    results: list[Any]

    def get_result(self, i: int) -> Any:
        return self.results[i]


def run(
    asm: str,
    constraints: str,
    values: Sequence[NDArray],
    dtypes: Sequence[np.dtype],
    pack: int,
) -> list[NDArray]:
    """What `tl.inline_asm_elementwise` gives for values of one shape: an array for each dtype."""
    kinds = constraints.replace(" ", "").split(",")
    outs = [kind for kind in kinds if kind.startswith("=")]
    columns = [column for value in values for column in _columns(value, pack)]
    sizes = [_per_register(np.dtype(dtype).itemsize * 8, pack) for dtype in dtypes]
    if len(columns) != len(kinds) - len(outs) or sum(pack // n for n in sizes) != len(outs):
        raise AssertionError(f"{constraints}: {len(columns)} registers come in, pack {pack}")
    for kind in kinds:
        if kind.lstrip("=&") not in _WIDTHS:
            raise NotImplementedError(f"constraint {kind}")
    shape = values[0].shape if values else (pack,)
    threads = int(np.prod(shape)) // pack
    state = _State(threads, {f"${len(outs) + i}": c for i, c in enumerate(columns)}, {}, outs)
    for statement in _statements(asm):
        _execute(statement, state)
    written = [state.registers[f"${i}"] for i in range(len(outs))]
    results, start = [], 0
    for dtype, n in zip(dtypes, sizes):
        held = written[start : start + pack // n]
        start += pack // n
        results.append(_elements(held, np.dtype(dtype), n).reshape(shape))
    return results


@dataclass(frozen=True)
class _State:
    threads: int
    registers: dict[str, Register]
    declared: dict[str, str]
    outs: list[str]

    def done(self) -> bool:
        """Has an output been written that may share its register with an input?"""
        return any(
            f"${i}" in self.registers and "&" not in kind for i, kind in enumerate(self.outs)
        )


def _per_register(bits: int, pack: int) -> int:
    """Elements that Triton puts into one register."""
    return min(pack, 32 // bits) if bits < 32 else 1


def _columns(value: NDArray, pack: int) -> list[Register]:
    """The registers that hold `pack` elements of each thread, in order."""
    bits = value.itemsize * 8
    n = _per_register(bits, pack)
    raw = np.ascontiguousarray(value).view(f"u{value.itemsize}").astype(np.uint64)
    parts = raw.reshape(-1, pack // n, n) << (np.arange(n, dtype=np.uint64) * np.uint64(bits))
    return list(np.bitwise_or.reduce(parts, -1).T)


def _elements(held: list[Register], dtype: np.dtype, n: int) -> NDArray:
    """The inverse of `_columns`."""
    shifts = np.arange(n, dtype=np.uint64) * np.uint64(dtype.itemsize * 8)
    parts = np.stack(held, -1)[..., None] >> shifts
    return np.ascontiguousarray(parts.astype(f"u{dtype.itemsize}")).view(dtype)


def _statements(asm: str) -> list[str]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", asm, flags=re.S)
    parts = (part.strip() for part in text.split(";"))
    parts = (part.lstrip("{ \t\n") for part in parts)  # a block may open before its first one
    return [part for part in parts if part.strip("} \t\n")]


def _execute(statement: str, state: _State) -> None:
    statement = statement.lstrip("} \t\n") if statement.startswith("}") else statement
    opcode, rest = statement.split(None, 1)
    if opcode == "pmevent":  # counts something, and changes nothing
        return
    operands = re.findall(r"\{[^}]*\}|[^,{}\s]+", rest)
    if opcode == ".reg":
        for name in operands[1:]:
            match = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
            names = [f"{match[1]}{i}" for i in range(int(match[2]))] if match else [name]
            state.declared.update(dict.fromkeys(names, operands[0]))
        return
    name, *modifiers = opcode.split(".")
    if name not in OPS:
        raise NotImplementedError(f"{opcode} is not emulated")
    sources = [_read(operand, state) for operand in operands[1:]]
    result = OPS[name](tuple(modifiers), *sources)
    targets = operands[0].strip("{}").split(",")
    if isinstance(result, list) != operands[0].startswith("{"):
        if len(targets) == 1:
            raise AssertionError(f"{statement}: one target")
        width = int(modifiers[-1].lstrip("bus")) // len(targets)
        result = [(result >> np.uint64(i * width)) & _ones(width) for i in range(len(targets))]
    for target, value in zip(targets, result if isinstance(result, list) else [result]):
        _write(target.strip(), value, state)


def _ones(width: int) -> np.uint64:
    return np.uint64((1 << width) - 1)


def _write(name: str, value: Register, state: _State) -> None:
    out = name.startswith("$") and int(name[1:]) < len(state.outs)
    if not out and name not in state.declared:
        raise AssertionError(f"{name} is written and not declared")
    state.registers[name] = np.broadcast_to(value, (state.threads,)).astype(np.uint64)


def _read(operand: str, state: _State) -> Any:
    if operand.startswith("{"):
        return [_read(part.strip(), state) for part in operand.strip("{}").split(",")]
    if re.fullmatch(r"-?\d+|-?0x[0-9a-fA-F]+", operand):
        return np.full(state.threads, int(operand, 0) & 0xFFFFFFFFFFFFFFFF, np.uint64)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
        return np.full(state.threads, int(operand[2:], 16), np.uint64)
    if operand not in state.registers:
        raise AssertionError(f"{operand} is read before it is set")
    if operand.startswith("$") and int(operand[1:]) >= len(state.outs) and state.done():
        raise AssertionError(f"{operand} is read after an output that may be the same register")
    return state.registers[operand]


def floats(bits: Register) -> NDArray[np.float32]:
    """The low 32 bits as a float."""
    return bits.astype(np.uint32).view(np.float32)


def float_bits(value: NDArray) -> Register:
    """Rounded to float32, as bits."""
    return np.asarray(value, np.float32).view(np.uint32).astype(np.uint64)


def bf16_bits(value: NDArray) -> Register:
    """Rounded to the nearest bfloat16, ties to even, as bits."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    nan = (bits & np.uint64(0x7FFFFFFF)) > np.uint64(0x7F800000)
    return np.where(nan, np.uint64(0x7FFF), rounded).reshape(np.shape(value))


def _halves(bits: Register, kind: str) -> NDArray[np.float64]:
    """The two numbers in a bf16x2 or f16x2 register [2, threads]."""
    both = np.stack([bits & _ones(16), (bits >> np.uint64(16)) & _ones(16)])
    if kind.startswith("bf16"):
        return floats(both << np.uint64(16)).astype(np.float64)
    return both.astype(np.uint16).view(np.float16).astype(np.float64)


def _half_bits(value: NDArray, kind: str) -> Register:
    if kind.startswith("bf16"):
        return bf16_bits(value)
    return value.astype(np.float16).view(np.uint16).astype(np.uint64)


def _arithmetic(
    compute: Callable[..., NDArray],
) -> Callable[..., Register]:
    """An instruction on f32, f16x2, bf16x2 (each computed in float64) or 32-bit integers."""

    def op(modifiers: tuple[str, ...], *sources: Register) -> Register:
        kind = modifiers[-1]
        if kind == "f32":
            return float_bits(compute(*(floats(s).astype(np.float64) for s in sources)))
        if kind in ("f16x2", "bf16x2"):
            low, high = _half_bits(compute(*(_halves(s, kind) for s in sources)), kind)
            return low | (high << np.uint64(16))
        if kind in ("s32", "u32") and "hi" not in modifiers and "wide" not in modifiers:
            return compute(*(s & _ones(32) for s in sources)) & _ones(32)
        raise NotImplementedError(f"arithmetic on {'.'.join(modifiers)}")

    return op


def _logic(compute: Callable[..., NDArray]) -> Callable[..., Register]:
    def op(modifiers: tuple[str, ...], *sources: Register) -> Register:
        return compute(*sources) & _ones(int(modifiers[-1].lstrip("bus")))

    return op


def _move(modifiers: tuple[str, ...], source: Any) -> Register:
    width = int(modifiers[-1].lstrip("busf"))
    if isinstance(source, list):
        part = width // len(source)
        joined = [(s & _ones(part)) << np.uint64(i * part) for i, s in enumerate(source)]
        return np.bitwise_or.reduce(joined)
    return source & _ones(width)


def _shift_left(modifiers: tuple[str, ...], a: Register, n: Register) -> Register:
    return np.where(n > 31, np.uint64(0), (a << np.minimum(n, np.uint64(32))) & _ones(32))


def _shift_right(modifiers: tuple[str, ...], a: Register, n: Register) -> Register:
    n = np.minimum(n, np.uint64(32))
    if modifiers[-1] == "s32":
        wide = a.astype(np.uint32).view(np.int32).astype(np.int64) >> n.astype(np.int64)
        return wide.astype(np.uint64) & _ones(32)
    return (a & _ones(32)) >> n


def _lop3(
    modifiers: tuple[str, ...], a: Register, b: Register, c: Register, table: Register
) -> Register:
    out = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & _ones(32)


def _prmt(modifiers: tuple[str, ...], a: Register, b: Register, c: Register) -> Register:
    if modifiers != ("b32",):
        raise NotImplementedError(f"prmt.{'.'.join(modifiers)}")
    both = (a & _ones(32)) | (b << np.uint64(32))
    out = np.zeros_like(a)
    for i in range(4):
        pick = (c >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
        out |= np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return out


def _convert(modifiers: tuple[str, ...], *sources: Register) -> Register:
    target, source = modifiers[-2:]
    if target in ("bf16x2", "f16x2") and source == "f32":
        high, low = (_half_bits(floats(s), target) for s in sources)
        return low | (high << np.uint64(16))
    if target in ("bf16", "f16") and source == "f32":
        return _half_bits(floats(sources[0]), target)
    if target == "f32" and source in ("bf16", "f16"):
        return float_bits(_halves(sources[0], source)[0])
    if target == "f32" and source in ("s32", "u32"):
        raw = sources[0].astype(np.uint32)
        return float_bits(raw.view(np.int32) if source == "s32" else raw)
    raise NotImplementedError(f"cvt.{'.'.join(modifiers)}")


def _matrix_a(registers: list[Register], kind: str) -> NDArray:
    """Registers of all threads -> [warps, 16, 8 len(registers) / 2]."""
    out = np.zeros((len(registers[0]) // 32, 16, 4 * len(registers)))
    for j, register in enumerate(registers):
        pair = _halves(register, kind).reshape(2, -1, 32)
        for i in (0, 1):
            out[:, _G + 8 * (j % 2), 2 * _T + i + 8 * (j // 2)] = pair[i]
    return out


def _matrix_b(registers: list[Register], kind: str) -> NDArray:
    out = np.zeros((len(registers[0]) // 32, 8 * len(registers), 8))
    for j, register in enumerate(registers):
        pair = _halves(register, kind).reshape(2, -1, 32)
        for i in (0, 1):
            out[:, 2 * _T + i + 8 * j, _G] = pair[i]
    return out


def _spread(kept: NDArray, meta: Register, selector: int) -> NDArray:
    """Kept values [warps, 16, 16] at the positions that the metadata gives -> [warps, 16, 32]."""
    words = meta.reshape(-1, 32).astype(np.int64)
    row, group = np.meshgrid(np.arange(16), np.arange(8), indexing="ij")
    lane = 4 * (row % 8) + 2 * selector + group // 4
    pairs = (words[:, lane] >> (16 * (row // 8) + 4 * (group % 4))) & 15
    first, second = pairs & 3, pairs >> 2
    if (first >= second).any():
        raise AssertionError("mma.sp::ordered_metadata: positions that do not ascend")
    out = np.zeros((*kept.shape[:2], 8, 4))
    for i, position in enumerate((first, second)):
        np.put_along_axis(out, position[..., None], kept[:, :, i::2, None], -1)
    return out.reshape(*kept.shape[:2], 32)


def _mma(modifiers: tuple[str, ...], a: Any, b: Any, c: Any, *sparse: Register) -> list[Register]:
    form = ".".join(modifiers)
    match = re.fullmatch(
        r"(sp::ordered_metadata\.)?sync\.aligned\.m16n8k(16|32)\.row\.col\.f32\.(b?f16)\.\3\.f32",
        form,
    )
    if match is None or bool(match[1]) != (match[2] == "32") or len(sparse) != 2 * bool(match[1]):
        raise NotImplementedError(f"mma.{form}")
    if len(a) != 4 or len(b) != int(match[2]) // 8 or len(c) != 4 or len(a[0]) % 32:
        raise AssertionError(f"mma.{form}: {len(a)}, {len(b)}, {len(c)} registers")
    A, B = _matrix_a(a, match[3]), _matrix_b(b, match[3])
    if sparse:
        A = _spread(A, sparse[0], int(sparse[1][0]))
    with np.errstate(invalid="ignore"):  # infinity times zero, as anywhere
        product = A @ B
    out = []
    for i, before in enumerate(c):
        part = product[:, _G + 8 * (i // 2), 2 * _T + i % 2].reshape(-1)
        out.append(float_bits(floats(before).astype(np.float64) + part))
    return out


OPS: dict[str, Callable[..., Any]] = {
    "mov": _move,
    "add": _arithmetic(lambda a, b: a + b),
    "sub": _arithmetic(lambda a, b: a - b),
    "mul": _arithmetic(lambda a, b: a * b),
    "fma": _arithmetic(lambda a, b, c: a * b + c),
    "mad": _arithmetic(lambda a, b, c: a * b + c),
    "and": _logic(lambda a, b: a & b),
    "or": _logic(lambda a, b: a | b),
    "xor": _logic(lambda a, b: a ^ b),
    "not": _logic(lambda a: ~a),
    "shl": _shift_left,
    "shr": _shift_right,
    "lop3": _lop3,
    "prmt": _prmt,
    "cvt": _convert,
    "mma": _mma,
}
"""Instruction -> what it does to the registers, given all modifiers and sources."""
