"""Random compressed linears as `linear_gpu` takes them, and the matrices they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cpu_linears import Kind, matrix
from slimfx.runtime.gpu_layout import form_of, lay_out, stacked
from slimfx.runtime.gpu_ops import Held
from slimfx.runtime.ops import linear_24, linear_bitmask, linear_int
from slimfx.runtime.pack import Packed24, PackedDense, PackedMatrix
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """What the op takes but x, and the weight and adapters of each part in float64."""

    held: Held
    parts: list[list[Tensor]]

    def exact(self, x: Tensor) -> Tensor:
        """y in float64, x L^T rounded to the dtype of x."""
        wide = x.double()
        return torch.cat([self._part(wide, x.dtype, *part) for part in self.parts], -1)

    def _part(self, x: Tensor, dtype: torch.dtype, W: Tensor, *adapters: Tensor) -> Tensor:
        if not adapters:
            return x @ W.T
        L, R = adapters
        return x @ W.T + (x @ L.T).to(dtype).double() @ R.T

    def magnitude(self, x: Tensor) -> Tensor:
        """The same of absolute values: what rounding errors are shares of."""
        found = [[m.abs() for m in part] for part in self.parts]
        return Linear(self.held, found).exact(x.double().abs())

    def arguments(self) -> tuple[Any, ...]:
        """Of the op, after x."""
        held = self.held
        numbers = [number for form in held.forms for number in form.numbers()]
        return list(held.fragments), list(held.stored), numbers, list(held.rows), held.rank

    def only(self, layout: str) -> Linear:
        """With one layout alone."""
        empty = {"fragments": "stored", "stored": "fragments"}[layout]
        return replace(self, held=replace(self.held, **{empty: []}))

    def to(self, device: str) -> Held:
        """The tensors on a device."""
        held = self.held
        there = {
            name: [tensor.to(device) for tensor in getattr(held, name)]
            for name in ("fragments", "stored")
        }
        return replace(held, **there)


def linear(
    kind: Kind,
    rows: Sequence[int],
    K: int,
    *,
    adapter: Kind | None = None,
    ranks: Sequence[int] = (),
    scales: str = "tensor",
    layouts: Sequence[str] = ("fragments", "stored"),
    seed: int = 0,
) -> Linear:
    """Parts [rows_i, K] with or without adapters."""
    draw = torch.Generator().manual_seed(seed)
    weights = [(matrix(kind, N, K, draw, scales=scales), K) for N in rows]
    groups, parts = [stacked(weights)], [[dense(*weight)] for weight in weights]
    rank = 0
    if adapter is not None:
        rank = ranks[0] if len(ranks) == 1 else -(-max(ranks) // 16) * 16
        sides = [(r, K) for r in ranks], [(N, r) for N, r in zip(rows, ranks)]
        L, R = (
            [(matrix(adapter, *size, draw, scales="group"), size[1]) for size in side]
            for side in sides
        )
        groups += [stacked(L, rows=rank), stacked(R, columns=rank)]
        for part, *pair in zip(parts, L, R):
            part += [dense(*each) for each in pair]
    laid = {
        layout: [t for m, width in groups for t in lay_out(m, width, layout)] for layout in layouts
    }
    kinds = tuple(form_of(*group) for group in groups)
    held = Held(laid.get("fragments", []), laid.get("stored", []), kinds, list(rows), rank)
    return Linear(held, parts)


def dense(stored: PackedMatrix | Tensor, K: int) -> Tensor:
    """A matrix [N, K] in float64, by the ops that define it."""
    if isinstance(stored, Tensor):
        return stored.double()
    eye, rest = torch.eye(K, dtype=torch.float64), (stored.scale, stored.bits, stored.group)
    if isinstance(stored, PackedDense):
        return linear_int(eye, stored.codes, *rest).T
    if isinstance(stored, Packed24):
        return linear_24(eye, stored.values, stored.indices, *rest).T
    return linear_bitmask(eye, stored.values, stored.mask, *rest).T
