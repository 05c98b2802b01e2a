"""Random compressed linears in every layout, laid out for the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from slimfx.runtime.cpu_ops import Form
from slimfx.runtime.interleave import Interleaved, interleave
from slimfx.runtime.pack import (
    Packed24,
    PackedBitmask,
    PackedDense,
    PackedMatrix,
    pack_24,
    pack_bitmask,
    pack_codes,
)
from torch import Tensor

Kind = tuple[str, int]
"""Where the values are and how many bits they have, as in `Form`."""


@dataclass(frozen=True)
class Linear:
    """The arguments of `linear_cpu` but x."""

    tensors: tuple[Tensor | None, ...]
    form: list[int]
    rows: list[int]
    ranks: list[int]

    def __call__(self, x: Tensor) -> Tensor:
        """The op on x."""
        op = torch.ops.slimfx.linear_cpu
        return op(x, *self.tensors, self.form, self.rows, self.ranks)


def matrix(
    kind: Kind, N: int, K: int, draw: torch.Generator, *, scales: str = "tensor"
) -> PackedMatrix | Tensor:
    """A random stored weight [N, K]; scales of a "tensor", each "row", or groups of 32."""
    where, bits = kind
    top = 2 ** (min(bits, 8) - 1) - 1
    if bits < 16:
        weight = torch.randint(-top, top + 1, (N, K), generator=draw).to(torch.int8)
    else:
        weight = torch.randn(N, K, generator=draw).to(torch.bfloat16)
    shape = {"tensor": (1, 1), "row": (N, 1), "group": (N, -(-K // 32))}[scales]
    scale = None
    if bits < 16:
        scale = ((torch.rand(shape, generator=draw) + 0.5) / top).bfloat16()
    if where == "dense":
        if bits >= 16:
            return weight.float() if bits == 32 else weight
        return PackedDense(pack_codes(weight, bits), scale, bits, 32)
    if where == "2:4":
        order = torch.rand(N, K // 4, 4, generator=draw).argsort(-1)
        values, indices = pack_24(weight * (order < 2).flatten(1), bits)
        return Packed24(values, indices, scale, bits, 32)
    stays = torch.rand(N, K, generator=draw) < 0.5
    stays[0, 0] = True
    values, mask = pack_bitmask(weight * stays, stays, bits)
    return PackedBitmask(values, mask, scale, bits, 32)


def linear(
    kind: Kind,
    rows: Sequence[int],
    K: int,
    *,
    adapter: tuple[Kind, Kind] | None = None,
    ranks: Sequence[int] = (),
    scales: str = "tensor",
    seed: int = 0,
) -> Linear:
    """Parts [rows_i, K] with or without adapters."""
    draw = torch.Generator().manual_seed(seed)
    stored = [[interleave(matrix(kind, N, K, draw, scales=scales), K) for N in rows]]
    if adapter is not None:
        first, second = adapter
        stored.append([interleave(matrix(first, r, K, draw), K) for r in ranks])
        stored.append([interleave(matrix(second, N, r, draw), r) for N, r in zip(rows, ranks)])
    tensors: list[Tensor | None] = []
    for parts in stored:
        tensors.append(torch.cat([part.data.flatten() for part in parts]))
        tensors.append(torch.cat([part.scale.flatten() for part in parts]))
    form = [number for parts in stored for number in _form(parts)]
    tensors += [None] * (6 - len(tensors))
    return Linear(tuple(tensors), form, list(rows), list(ranks) if adapter else [])


def _form(parts: list[Interleaved]) -> list[int]:
    widest = max(parts, key=lambda part: part.group)
    return Form(widest.where, widest.bits, widest.group).numbers()
