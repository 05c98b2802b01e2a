"""What `slimfx bench kernels --device cuda` measures: a random layer in every contender's way.

bfloat16     torch.nn.functional.linear, by cuBLAS
aten int4    torch's own op: int4 in groups of 128
slim         2:4 int4 with a scale for each row, by the kernel that `select` chooses
slim lora    the same with int4 adapters, rank a tenth of the smaller side, in the same op
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimfx.bench_check import sample
from slimfx.runtime import select
from slimfx.runtime.gpu_layout import form_of, lay_out
from slimfx.runtime.gpu_ops import Held, launch
from slimfx.runtime.pack import (
    Packed24,
    PackedDense,
    PackedLinear,
    PackedMatrix,
    unpack_24,
    unpack_codes,
)
from slimfx.runtime.select import DECODE_ROWS, Gpu, gpu_of

Call = Callable[[], Any]
Exact = Callable[[Tensor], Tensor]
FLOAT = "bfloat16"
GROUP = 128
_ASCENDING = (4, 8, 9, 12, 13, 14)
"""The pairs of positions in four, as `pack_24` stores them."""
_ALL = 1 << 30


@dataclass(frozen=True)
class Layer:
    """Linears of K inputs that run in one launch, with the outputs that each has."""

    name: str
    K: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.K}x{self.N}"

    @property
    def N(self) -> int:
        """Outputs of all."""
        return sum(self.rows)

    @property
    def rank(self) -> int:
        """Of each one's adapters: a tenth of the smaller side, in whole tiles if there are more."""
        rank = max(1, *(min(self.K, N) // 10 for N in self.rows))
        return rank if len(self.rows) == 1 else -(-rank // 16) * 16


@dataclass(frozen=True)
class Contender:
    """One way to run a layer, on random weights of its own."""

    name: str
    limit: float
    """The largest error that its precision explains, in standard deviations of the product."""
    bytes: int
    """Of one copy of the weights."""
    exact: Exact
    """x float64 [M, K] -> the outputs that `sample` names."""
    bind: Callable[[Tensor], list[Call]]
    """x [M, K] -> for each copy of the weights a call that returns y."""
    kernel: Callable[[int], str] = lambda M: ""
    """Which of our kernels runs for M rows of x."""
    most: int = _ALL
    """Rows of x up to which it is worth measuring."""


def contenders(
    layer: Layer, device: str, copies: int, *, ours_only: bool = False
) -> list[Contender]:
    """All of them, bfloat16 first.

    Args:
        copies: bytes that the copies of a contender's weights have together, at least.
    """
    draw = torch.Generator(device).manual_seed(0)
    ours = [_ours(layer, draw, copies, adapted) for adapted in (False, True)]
    return ours if ours_only else [_float(layer, draw, copies), _aten(layer, draw, copies), *ours]


def _product(W: Tensor, x: Tensor) -> Tensor:
    return x @ W.T


def _copied(tensors: Sequence[Tensor], copies: int) -> list[list[Tensor]]:
    size = sum(tensor.nbytes for tensor in tensors)
    more = max(0, -(-copies // size) - 1)
    return [list(tensors), *([tensor.clone() for tensor in tensors] for _ in range(more))]


def _float(layer: Layer, draw: torch.Generator, copies: int) -> Contender:
    W = torch.randn(layer.N, layer.K, generator=draw, device=draw.device, dtype=torch.bfloat16)
    sets = _copied([W], copies)

    def bind(x: Tensor) -> list[Call]:
        return [partial(torch.nn.functional.linear, x, weight) for (weight,) in sets]

    known = W[sample(layer.N).to(W.device)].double()
    return Contender(FLOAT, 0.03, W.nbytes, partial(_product, known), bind)


def _bytes(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=draw, device=draw.device, dtype=torch.uint8)


def _codes(draw: torch.Generator, *shape: int) -> Tensor:
    """Two codes from -7 to 7 a byte."""
    both = torch.randint(0, 225, shape, generator=draw, device=draw.device, dtype=torch.uint8)
    return ((both // 15 + 1) << 4) | (both % 15 + 1)


def _aten(layer: Layer, draw: torch.Generator, copies: int) -> Contender:
    """The CUDA op, or the CPU's where there is no GPU."""
    N, K = layer.N, layer.K
    codes = _bytes(draw, N, K // 2)  # the first of two inputs in the high half
    power = torch.randint(4, 8, (K // GROUP, N), generator=draw, device=draw.device)
    scale = torch.exp2(-power.float())
    scales = torch.stack([scale, torch.zeros_like(scale)], -1).bfloat16()
    if codes.device.type == "cpu":
        op: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
        wide = torch.stack([codes >> 4, codes & 15], -1).flatten(1).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide, 1)
    else:
        op = torch.ops.aten._weight_int4pack_mm
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    sets = _copied([packed, scales], copies)

    def bind(x: Tensor) -> list[Call]:
        return [partial(op, x, weight, GROUP, each) for weight, each in sets]

    rows = sample(N).to(codes.device)
    known = torch.stack([codes[rows] >> 4, codes[rows] & 15], -1).flatten(1).double() - 8
    known *= scale.T[rows].double().repeat_interleave(GROUP, 1)
    size = packed.nbytes + scales.nbytes
    return Contender("aten int4", 0.03, size, partial(_product, known), bind, most=256)


def _two_four(N: int, K: int, draw: torch.Generator) -> Packed24:
    """Random codes and positions, a scale for each row."""
    pairs = torch.tensor(_ASCENDING, dtype=torch.uint8, device=draw.device)
    low, high = (pairs[(_bytes(draw, N, K // 8) % 6).long()] for _ in "12")
    scale = (torch.rand(N, 1, generator=draw, device=draw.device) + 0.5) / 64
    return Packed24(_codes(draw, N, K // 4), low | (high << 4), scale.bfloat16(), 4, K)


def _grouped(N: int, K: int, draw: torch.Generator) -> PackedDense:
    """Random codes, a scale for each row and group of 128."""
    codes = _codes(draw, N, -(-K // 2))
    if K % 2:  # what is left of the last byte is a zero code
        codes[:, -1] = codes[:, -1] & 15 | 0x80
    scale = torch.rand(N, -(-K // GROUP), generator=draw, device=draw.device) / 32
    return PackedDense(codes, scale.bfloat16(), 4, GROUP)


def matrices_of(
    layer: Layer, draw: torch.Generator, *, adapted: bool
) -> list[tuple[PackedMatrix, int]]:
    """The weight of a layer and, if `adapted`, L and R, random, each with its K."""
    K, N, parts = layer.K, layer.N, len(layer.rows)
    found: list[tuple[PackedMatrix, int]] = [(_two_four(N, K, draw), K)]
    if adapted:
        rank = layer.rank
        found += [(_grouped(parts * rank, K, draw), K), (_grouped(N, rank, draw), rank)]
    return found


def _ours(layer: Layer, draw: torch.Generator, copies: int, adapted: bool) -> Contender:
    rank = layer.rank if adapted else 0
    matrices = matrices_of(layer, draw, adapted=adapted)
    forms = tuple(form_of(*matrix) for matrix in matrices)
    gpu = gpu_of(draw.device) if draw.device.type == "cuda" else Gpu("cuda", 90)
    empty = Held([], [], forms, layer.rows, rank)
    made: dict[str, list[list[Tensor]]] = {}

    def layout(M: int) -> str:
        choice = select.select(select.Layer(forms[0], forms[1:]), M, gpu)
        return select.LAYOUTS[choice.kernel or "expand"]

    def bind(x: Tensor) -> list[Call]:
        name = layout(len(x))
        if name not in made:  # the other one's memory is free again
            made.clear()
            laid = [tensor for matrix in matrices for tensor in lay_out(*matrix, name)]
            made[name] = _copied(laid, copies)
        given: list[dict[str, Any]] = [{name: tensors} for tensors in made[name]]
        held = [replace(empty, **each) for each in given]
        return [partial(launch, x, each, gpu) for each in held]

    def kernel(M: int) -> str:
        layouts = ("fragments",) if M <= DECODE_ROWS and layout(M) == "fragments" else ("stored",)
        found = select.select(select.Layer(forms[0], forms[1:]), M, gpu, layouts=layouts)
        return found.kernel or ""

    size = sum(
        value.nbytes
        for matrix, _ in matrices
        for value in vars(matrix).values()
        if isinstance(value, Tensor)
    )
    exact = exact_product(layer, matrices, rank)
    return Contender("slim lora" if adapted else "slim", 0.05, size, exact, bind, kernel)


def random_linear(N: int, K: int, draw: torch.Generator) -> PackedLinear:
    """2:4 int4 and int4 adapters of a tenth of the rank, on the generator's device."""
    rank = max(1, min(N, K) // 10)
    small = torch.full((1, 1), 1e-3, dtype=torch.bfloat16, device=draw.device)
    L, R = (
        replace(each, scale=small.expand_as(each.scale).contiguous())
        for each in (_grouped(rank, K, draw), _grouped(N, rank, draw))
    )
    return PackedLinear(replace(_two_four(N, K, draw), scale=small), L, R)


def exact_product(layer: Layer, matrices: Sequence[tuple[PackedMatrix, int]], rank: int) -> Exact:
    """x float64 -> the outputs that `sample` names."""
    weight: Any = matrices[0][0]
    rows = sample(layer.N).to(weight.values.device)
    W = unpack_24(weight.values[rows], weight.indices[rows], 4, layer.K).double()
    W *= weight.scale[rows].double()
    if not rank:
        return partial(_product, W)
    ends = torch.tensor(layer.rows, device=rows.device).cumsum(0)
    part = torch.bucketize(rows, ends, right=True)
    L, R = (_dense(matrix, K) for matrix, K in matrices[1:])
    second = R[rows].double()

    def adapted(x: Tensor) -> Tensor:
        z = (x @ L.double().T).unflatten(-1, (-1, rank))
        return x @ W.T + (z[:, part] * second).sum(-1)

    return adapted


def _dense(matrix: Any, K: int) -> Tensor:
    codes = unpack_codes(matrix.codes, 4, K).float()
    return codes * matrix.scale.float().repeat_interleave(GROUP, 1)[:, :K]
