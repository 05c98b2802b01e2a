"""What `slimfx bench kernels` measures: one random linear, stored and run in every contender's way.

    slim         2:4 int4, one scale, by our op compiled by Inductor
    slim lora    the same with int4 adapters, rank a tenth of the smaller side, in the same call
    slim a8, slim lora a8  the same on x rounded to eight bits a row
    float32, bfloat16      torch.nn.functional.linear
    aten int4    torch's own op: int4 in groups of 128, bfloat16 activations
    ort int4, ort int4 a8  ONNX Runtime's MatMulNBits in blocks of 128, at accuracy levels 1 and 4

All stand for weights that bfloat16 holds exactly, so that each has one exact product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from slimfx.bench_check import sample
from slimfx.errors import need
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.interleave import Interleaved, interleave
from slimfx.runtime.pack import Packed24, PackedDense, PackedMatrix, pack_24, pack_codes

Call = Callable[[], Any]
Exact = Callable[[Tensor], Tensor]
FLOAT = "float32"
OURS = ("slim", "slim lora", "slim a8", "slim lora a8")
_LEVELS = {"ort int4": 1, "ort int4 a8": 4}
"""What ONNX Runtime calls accuracy: 1 computes in float32, 4 rounds x to int8."""
GROUP = 128
_CHUNK = 1024
"""Rows that are packed at a time, to bound memory."""
_PAIRS = sorted(set(itertools.permutations([1, 1, 0, 0])))
"""The six ways to keep two of four."""


@dataclass(frozen=True)
class Shape:
    """A linear of K inputs and N outputs."""

    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.K}x{self.N}"

    @property
    def rank(self) -> int:
        """Of its adapters: a tenth of the smaller side."""
        return max(1, min(self.K, self.N) // 10)


@dataclass(frozen=True)
class Contender:
    """One way to run a linear, on random weights of its own."""

    name: str
    dtype: torch.dtype
    """Of x."""
    limit: float
    """The largest error that its precision explains, in standard deviations of the product."""
    bytes: int
    """Of one copy of the weights."""
    exact: Exact
    """x float64 [M, K] -> the outputs that `sample` names."""
    bind: Callable[[Tensor], list[Call]]
    """x [M, K] -> for each copy of the weights a call that returns y."""


def contenders(shape: Shape, copies: int) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run here, float32 first, and why others cannot, by name.

    Args:
        copies: bytes that the copies of a contender's weights have together, at least.
    """
    draw = torch.Generator().manual_seed(0)
    codes = _codes(shape.N, shape.K, draw)
    power = torch.randint(4, 8, (shape.N, shape.K // GROUP), generator=draw)
    scale = torch.exp2(-power.float())  # bfloat16 holds a code times a power of two
    weight = codes.float() * scale.repeat_interleave(GROUP, 1)
    exact = partial(_product, weight[sample(shape.N)].double())
    found = [
        _in_float(FLOAT, weight, 1e-4, exact, copies),
        _in_float("bfloat16", weight.bfloat16(), 0.03, exact, copies),
        _aten_int4(codes, scale, exact, copies),
    ]
    del weight
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if not missing:
        found += [
            _ort_int4(name, codes, scale, level, exact, copies) for name, level in _LEVELS.items()
        ]
    why = f"{' and '.join(missing)} not installed"
    notes = dict.fromkeys(_LEVELS, why) if missing else {}
    return [*found, *_slim(shape, draw, copies)], notes


def _codes(N: int, K: int, draw: torch.Generator) -> Tensor:
    return torch.randint(-7, 8, (N, K), generator=draw, dtype=torch.int8)


def _product(W: Tensor, x: Tensor) -> Tensor:
    return x @ W.T


def _copied(tensors: Sequence[Tensor], copies: int) -> tuple[int, list[list[Tensor]]]:
    """Bytes of the tensors, and enough copies of them."""
    size = sum(tensor.nbytes for tensor in tensors)
    return size, [[tensor.clone() for tensor in tensors] for _ in range(-(-copies // size))]


def _in_float(name: str, weight: Tensor, limit: float, exact: Exact, copies: int) -> Contender:
    size, sets = _copied([weight], copies)

    def bind(x: Tensor) -> list[Call]:
        return [partial(torch.nn.functional.linear, x, weight) for (weight,) in sets]

    return Contender(name, weight.dtype, limit, size, exact, bind)


def _aten_int4(codes: Tensor, scale: Tensor, exact: Exact, copies: int) -> Contender:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    scale_and_zero = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16()
    size, sets = _copied([packed, scale_and_zero], copies)
    op = torch.ops.aten._weight_int4pack_mm_for_cpu

    def bind(x: Tensor) -> list[Call]:
        return [partial(op, x, weight, GROUP, scales) for weight, scales in sets]

    return Contender("aten int4", torch.bfloat16, 0.03, size, exact, bind)


def _ort_int4(
    name: str, codes: Tensor, scale: Tensor, level: int, exact: Exact, copies: int
) -> Contender:
    """A session for each copy."""
    blocks = (codes.view(torch.uint8) + 8).unflatten(1, (-1, GROUP))
    packed = blocks[..., ::2] | (blocks[..., 1::2] << 4)
    size = packed.nbytes + scale.nbytes
    model = _matmul_nbits(packed, scale, level)
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # or idle threads of one session take the cores from the next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    on = ["CPUExecutionProvider"]
    sessions = [
        runtime.InferenceSession(model, options, providers=on) for _ in range(-(-copies // size))
    ]

    def bind(x: Tensor) -> list[Call]:
        return [_bound(session, x, len(codes)) for session in sessions]

    return Contender(name, torch.float32, {1: 1e-4, 4: 0.1}[level], size, exact, bind)


def _matmul_nbits(packed: Tensor, scale: Tensor, level: int) -> bytes:
    """An ONNX model y = x W^T of packed uint8 [N, K / 128, 64], scale [N, K / 128]."""
    onnx = need("onnx")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    N, K = len(packed), packed.shape[1] * GROUP
    node = helper.make_node(
        "MatMulNBits",
        ["x", "W", "scale"],
        ["y"],
        domain="com.microsoft",
        **{"K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": level},
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", real, ["M", K])],
        [helper.make_tensor_value_info("y", real, ["M", N])],
        [
            onnx.numpy_helper.from_array(packed.numpy(), "W"),
            onnx.numpy_helper.from_array(scale.numpy(), "scale"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


def _bound(session: Any, x: Tensor, N: int) -> Call:
    held = x, torch.empty(len(x), N)  # a binding knows addresses alone
    binding = session.io_binding()
    binds = binding.bind_input, binding.bind_output
    for bind, name, tensor in zip(binds, "xy", held, strict=True):
        bind(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return held[1]

    return call


def _slim(shape: Shape, draw: torch.Generator, copies: int) -> list[Contender]:
    """The same weight without and with adapters, on x as it is and rounded."""
    K, N, r = shape.K, shape.N, shape.rank
    stored_W, W = _stored(_two_four, N, K, draw, sample(N))
    stored_L, L = _stored(_grouped, r, K, draw, torch.arange(r))
    stored_R, R = _stored(_grouped, N, r, draw, sample(N))

    def adapted(x: Tensor) -> Tensor:
        return x @ W.T + (x @ L.T) @ R.T

    kinds: list[tuple[list[Interleaved], Exact]] = [
        ([stored_W], partial(_product, W)),
        ([stored_W, stored_L, stored_R], adapted),
    ]
    cases = zip(OURS, (False, False, True, True), kinds * 2, strict=True)
    return [_ours(name, shape, *kind, rounded, copies) for name, rounded, kind in cases]


def _ours(
    name: str,
    shape: Shape,
    matrices: Sequence[Interleaved],
    exact: Exact,
    rounded: bool,
    copies: int,
) -> Contender:
    from slimfx.runtime.inductor import kernels  # loads the compiler, slow

    tensors = [part.flatten() for matrix in matrices for part in (matrix.data, matrix.scale)]
    form = [n for m in matrices for n in Form(m.where, m.bits, m.group).numbers()]
    ranks = [shape.rank] if len(matrices) == 3 else []
    absent = [None] * (6 - len(tensors))
    size, sets = _copied(tensors, copies)
    for tensor in itertools.chain(*sets):
        torch._dynamo.mark_static(tensor)

    @torch.compile
    def run(x: Tensor, *weights: Tensor) -> Tensor:
        op = torch.ops.slimfx.linear_cpu
        return op(x, *weights, *absent, form, [shape.N], ranks, rounded)

    def bind(x: Tensor) -> list[Call]:
        if len(x) > 1:  # Dynamo makes another program for 1 anyway
            torch._dynamo.mark_dynamic(x, 0)
        with kernels():
            run(x, *sets[0])
        return [partial(run, x, *weights) for weights in sets]

    return Contender(name, torch.float32, 0.1 if rounded else 1e-4, size, exact, bind)


def _stored(
    make: Callable[[int, int, torch.Generator], tuple[PackedMatrix, Tensor]],
    N: int,
    K: int,
    draw: torch.Generator,
    known: Tensor,
) -> tuple[Interleaved, Tensor]:
    """A random matrix [N, K] as kernels read it, and its rows `known` in float64."""
    parts, rows = [], []
    for start in range(0, N, _CHUNK):
        matrix, weight = make(min(_CHUNK, N - start), K, draw)
        parts.append(interleave(matrix, K))
        here = known[(known >= start) & (known < start + _CHUNK)] - start
        rows.append(weight[here].double())
    data, scale = (torch.cat([getattr(p, name) for p in parts]) for name in ("data", "scale"))
    return replace(parts[0], data=data, scale=scale), torch.cat(rows)


def _two_four(N: int, K: int, draw: torch.Generator) -> tuple[PackedMatrix, Tensor]:
    """2:4 codes [N, K] with one scale, packed and dense."""
    pairs = torch.tensor(_PAIRS, dtype=torch.int8)
    codes = _codes(N, K, draw) * pairs[torch.randint(6, (N, K // 4), generator=draw)].flatten(1)
    scale = torch.full((1, 1), 1 / 64).bfloat16()
    return Packed24(*pack_24(codes, 4), scale, 4, K), codes.float() * scale.float()


def _grouped(N: int, K: int, draw: torch.Generator) -> tuple[PackedMatrix, Tensor]:
    """Dense codes [N, K] with scales of groups of 128, packed and dense."""
    codes = _codes(N, K, draw)
    scale = (torch.rand(N, -(-K // GROUP), generator=draw) / 32).bfloat16()
    dense = codes.float() * scale.float().repeat_interleave(GROUP, 1)[:, :K]
    return PackedDense(pack_codes(codes, 4), scale, 4, GROUP), dense
