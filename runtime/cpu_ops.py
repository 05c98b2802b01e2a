"""The op of a compressed linear on CPUs: weight, adapters and neighbours that read the same x.

    linear_cpu  y = [x W_1^T + (x L_1^T) R_1^T, x W_2^T + (x L_2^T) R_2^T, ...]

Every matrix is as `interleave` lays it out. The reference here is the definition; kernels are
`inductor/linear.h`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from slimfx.runtime.interleave import LANES, WHERE, Interleaved, dense_weight, whole
from torch import Tensor
from torch.nn.functional import linear

_LIBRARY = torch.library.Library("slimfx", "FRAGMENT")
_FIELDS = 3


@dataclass(frozen=True)
class Form:
    """How the numbers of a matrix are stored; see `Interleaved`."""

    where: str
    bits: int
    group: int

    def numbers(self) -> list[int]:
        """As an op takes it."""
        return [WHERE.index(self.where), self.bits, self.group]

    def tile_bytes(self, K: int) -> int:
        """Bytes of a tile of K inputs, where these do not depend on the values."""
        if self.where == "bitmask":
            raise AssertionError("a bitmask tile has as many bytes as its values need")
        values = whole(K) // (2 if self.where == "2:4" else 1) * LANES * self.bits // 8
        return values + (whole(K) // 16 * 32 if self.where == "2:4" else 0)


def forms(numbers: Sequence[int]) -> list[Form]:
    """One `Form` for each matrix of a `linear_cpu`: weight, then L and R if there are any."""
    fields = [numbers[i : i + _FIELDS] for i in range(0, len(numbers), _FIELDS)]
    return [Form(WHERE[where], bits, group) for where, bits, group in fields]


def linear_cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    L: Tensor | None,
    L_scale: Tensor | None,
    R: Tensor | None,
    R_scale: Tensor | None,
    form: list[int],
    rows: list[int],
    ranks: list[int],
    rounded: bool = False,
) -> Tensor:
    """y [..., sum(rows)] for x [..., K], float32 or bfloat16.

    Args:
        weight: uint8, the tiles of all parts one after the other; L and R too.
        scale: bfloat16, in the order of the tiles; L_scale and R_scale too.
        form: three numbers for each matrix, `Form.numbers`.
        rows: N of each part; multiples of 16 but the last.
        ranks: r of each part, empty without adapters.
        rounded: each row of x is rounded to multiples of max |x| / 127 first.
    """
    _check(x, (weight, scale, L, L_scale, R, R_scale), form, rows, ranks)
    K = x.shape[-1]
    kinds = forms(form)
    wide = x.to(torch.float32) if x.dtype is torch.bfloat16 else x
    if rounded:
        wide = round_rows(wide)
    W = _parts(weight, scale, kinds[0], rows, [K] * len(rows), wide.dtype)
    out = [linear(wide, part) for part in W]
    if L is not None and R is not None and L_scale is not None and R_scale is not None:
        Ls = _parts(L, L_scale, kinds[1], ranks, [K] * len(ranks), wide.dtype)
        Rs = _parts(R, R_scale, kinds[2], rows, ranks, wide.dtype)
        out = [y + linear(linear(wide, A), B) for y, A, B in zip(out, Ls, Rs)]
    return torch.cat(out, -1).to(x.dtype)


def round_rows(x: Tensor) -> Tensor:
    """Every row as 8-bit integers times a step of its own, max |x| / 127, would carry it."""
    step = x.abs().amax(-1, keepdim=True) / 127 if x.numel() else x
    return torch.where(step > 0, (x * (1 / step)).round() * step, 0.0).to(x.dtype)


def _parts(
    data: Tensor, scale: Tensor, form: Form, rows: list[int], widths: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """The dense matrices [N, K] that follow each other in `data`."""
    parts = []
    byte = number = 0
    for N, K in zip(rows, widths):
        tiles = whole(N) // LANES
        size = data.numel() // tiles if form.where == "bitmask" else form.tile_bytes(K)
        bytes_, numbers = tiles * size, tiles * groups(form, K) * LANES
        matrix = Interleaved(
            data[byte : byte + bytes_].unflatten(0, (tiles, size)),
            scale[number : number + numbers].unflatten(0, (tiles, -1, LANES)),
            *(form.where, form.bits, form.group),
        )
        parts.append(dense_weight(matrix, N, K, dtype))
        byte, number = byte + bytes_, number + numbers
    return parts


def groups(form: Form, K: int) -> int:
    """Scales of a row of K inputs."""
    return -(-whole(K) // min(form.group, whole(K)))


def _check(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    form: list[int],
    rows: list[int],
    ranks: list[int],
) -> None:
    """`tensors`: data and scale of the weight, then of L and R."""
    adapters = [tensor is not None for tensor in tensors[2:]]
    torch._check(
        x.dtype in (torch.float32, torch.bfloat16, torch.float64),
        lambda: f"linear_cpu: x is {x.dtype}, not float32 or bfloat16",
    )
    torch._check(
        len(form) == _FIELDS * (3 if all(adapters) else 1) and all(adapters) == any(adapters),
        lambda: f"linear_cpu: {len(form)} numbers of form, {sum(adapters)} tensors of adapters",
    )
    torch._check(
        all(N % LANES == 0 for N in rows[:-1])
        and len(ranks) == (len(rows) if all(adapters) else 0),
        lambda: f"linear_cpu: rows {rows} and ranks {ranks} of its parts",
    )
    K, kinds = x.shape[-1], forms(form)
    shapes = ((rows, [K] * len(rows)), (ranks, [K] * len(ranks)), (rows, ranks))
    for i, (name, kind) in enumerate(zip(("weight", "L", "R"), kinds)):
        data, scale = tensors[2 * i : 2 * i + 2]
        assert data is not None and scale is not None  # as many kinds as matrices
        _check_size(name, data, scale, kind, *shapes[i])


def _check_size(
    name: str, data: Tensor, scale: Tensor, form: Form, rows: list[int], widths: list[int]
) -> None:
    tiles = [whole(N) // LANES for N in rows]
    scales = sum(t * groups(form, K) * LANES for t, K in zip(tiles, widths))
    torch._check(
        scale.dim() == 1 and scale.shape[0] == scales and scale.dtype is torch.bfloat16,
        lambda: f"linear_cpu: {name} has {tuple(scale.shape)} scales, not bfloat16 [{scales}]",
    )
    if form.where == "bitmask":
        torch._check(
            len(rows) == 1 and data.dim() == 1 and data.shape[0] % tiles[0] == 0,
            lambda: f"linear_cpu: {name} is a bitmask of {len(rows)} parts, {tuple(data.shape)}",
        )
        return
    size = sum(t * form.tile_bytes(K) for t, K in zip(tiles, widths))
    torch._check(
        data.dim() == 1 and data.shape[0] == size and data.dtype is torch.uint8,
        lambda: f"linear_cpu: {name} is {data.dtype} {tuple(data.shape)}, not uint8 [{size}]",
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    L: Tensor | None,
    L_scale: Tensor | None,
    R: Tensor | None,
    R_scale: Tensor | None,
    form: list[int],
    rows: list[int],
    ranks: list[int],
    rounded: bool = False,
) -> Tensor:
    _check(x, (weight, scale, L, L_scale, R, R_scale), form, rows, ranks)
    return x.new_empty(*x.shape[:-1], sum(rows))


_LIBRARY.define(
    "linear_cpu(Tensor x, Tensor weight, Tensor scale, Tensor? L, Tensor? L_scale, Tensor? R, "
    "Tensor? R_scale, int[] form, int[] rows, int[] ranks, bool rounded=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear_cpu", linear_cpu, "CompositeExplicitAutograd")
torch.library.register_fake("slimfx::linear_cpu", _fake, lib=_LIBRARY)
