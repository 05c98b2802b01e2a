"""The layouts of a compressed weight that GPU kernels read, for linears that share their input.

    fragments   data, scale                 as `fragments.py` says, for up to 16 rows of x
    stored      words [, places], scale     as `portable_24`, `portable_int4` read four bits
                codes, scale; values, places, scale; values, mask, rows, blocks, scale    others
                one tensor of floats

Weights of several linears follow each other by rows, and so do the adapters L, each padded with
zero rows to one rank, and R, each padded with zero columns to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from slimfx.runtime import fragments
from slimfx.runtime.fragments import Fragments
from slimfx.runtime.pack import (
    FLOAT_BITS,
    Packed24,
    PackedBitmask,
    PackedDense,
    PackedMatrix,
    pack_24,
    pack_codes,
    unpack_24,
    unpack_bitmask,
    unpack_codes,
)
from slimfx.runtime.select import Form
from torch import Tensor
from torch.nn.functional import pad

Sized = tuple[PackedMatrix | Tensor, int]
"""A stored matrix [N, K] and its K."""
COUNT = {"dense": 2, "2:4": 3, "bitmask": 5, "floats": 1}
"""Tensors of a matrix in the layout "stored"; there are two of fragments."""
WORDS = 16
"""Groups of four-bit codes are multiples of it where a portable kernel reads them."""


def form_of(matrix: PackedMatrix | Tensor, K: int) -> Form:
    """How a matrix [N, K] is stored."""
    if isinstance(matrix, Tensor):
        return Form("floats", 8 * matrix.itemsize, 0)
    where = {PackedDense: "dense", Packed24: "2:4", PackedBitmask: "bitmask"}[type(matrix)]
    one = matrix.scale is None or matrix.scale.shape[1] == 1
    return Form(where, matrix.bits, 0 if one else matrix.group)


def why_not(matrix: PackedMatrix | Tensor, K: int) -> str | None:
    """Why no kernel takes a matrix [N, K], whatever the GPU, or None if one does."""
    if isinstance(matrix, Tensor):
        fits = matrix.dtype in (torch.bfloat16, torch.float16, torch.float32)
        return None if fits else f"{matrix.dtype} adapters, not bfloat16, float16 or float32"
    if isinstance(matrix, Packed24):
        both = torch.stack([matrix.indices & 15, matrix.indices >> 4], -1)
        pairs = both.flatten(1)[:, : K // 4]
        if bool(((pairs & 3) >= (pairs >> 2)).any()):
            return "positions of 2:4 values that do not ascend"
    return None


def stacked(matrices: Sequence[Sized], *, rows: int = 0, columns: int = 0) -> Sized:
    """Matrices of one kind, each padded to at least so many rows or columns, as one."""
    widest = max(columns, *(K for _, K in matrices))
    parts = [_padded(matrix, K, rows, widest) for matrix, K in matrices]
    if len(parts) == 1:
        return parts[0], widest
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts), widest  # type: ignore[arg-type]
    if isinstance(first, PackedBitmask):
        raise AssertionError("stacked: the rows of two bitmasks do not follow each other")
    values: Any = {"codes": PackedDense, "values": Packed24}
    name = next(name for name, kind in values.items() if isinstance(first, kind))
    tensors = {name: torch.cat([getattr(part, name) for part in parts])}
    if isinstance(first, Packed24):
        tensors["indices"] = torch.cat([getattr(part, "indices") for part in parts])  # noqa: B009
    scale: Any = _scales([(part, len(getattr(part, name))) for part in parts], widest)
    return type(first)(**tensors, scale=scale, bits=first.bits, group=first.group), widest


def _scales(parts: Sequence[tuple[Any, int]], K: int) -> Tensor | None:
    """bfloat16 [rows, groups] of matrices with so many rows each."""
    if parts[0][0].scale is None:
        return None
    width = max(part.scale.shape[1] for part, _ in parts)
    groups = -(-K // parts[0][0].group) if width > 1 else 1
    found = []
    for part, N in parts:
        every = part.scale.expand(N, -1)
        if width > 1 and every.shape[1] == 1:
            every = every.expand(-1, groups)
        found.append(pad(every, (0, groups - every.shape[1])))
    return torch.cat(found)


def _padded(
    matrix: PackedMatrix | Tensor, K: int, rows: int, columns: int
) -> PackedMatrix | Tensor:
    """[N, K] with zeros to [rows, columns] where it is smaller."""
    if isinstance(matrix, Tensor):
        return pad(matrix.detach(), (0, columns - K, 0, max(0, rows - matrix.shape[0])))
    if isinstance(matrix, PackedBitmask):
        return matrix
    N = matrix.codes.shape[0] if isinstance(matrix, PackedDense) else matrix.values.shape[0]
    if K == columns and N >= rows:
        return matrix
    sides = (0, columns - K, 0, max(0, rows - N))
    scale = matrix.scale
    if scale is not None and scale.shape[0] > 1:
        scale = pad(scale, (0, 0, 0, sides[3]))
    if scale is not None and scale.shape[1] > 1:
        scale = pad(scale, (0, -(-columns // matrix.group) - scale.shape[1]))
    values = pad(_values(matrix, K), sides)
    if isinstance(matrix, PackedDense):
        assert scale is not None  # there are no dense matrices without
        return PackedDense(pack_codes(values, matrix.bits), scale, matrix.bits, matrix.group)
    return Packed24(*pack_24(values, matrix.bits), scale, matrix.bits, matrix.group)


def _values(matrix: PackedMatrix, K: int) -> Tensor:
    """The codes int8, or values bfloat16, [N, K]."""
    if isinstance(matrix, PackedDense):
        return unpack_codes(matrix.codes, matrix.bits, K)
    if isinstance(matrix, Packed24):
        return unpack_24(matrix.values, matrix.indices, matrix.bits, K)
    return unpack_bitmask(matrix.values, matrix.mask, matrix.bits, K)


def lay_out(matrix: PackedMatrix | Tensor, K: int, layout: str) -> list[Tensor]:
    """The tensors of a matrix [N, K] in a layout.

    Raises:
        SlimError: Triton is not installed.
    """
    if isinstance(matrix, Tensor):
        return [matrix.detach().contiguous()]
    if layout == "fragments":
        made = fragments.fragments(matrix, K)
        return [made.data, made.scale]
    ones = torch.ones(1, 1, dtype=torch.bfloat16, device=_device(matrix))
    if isinstance(matrix, PackedBitmask):
        from slimfx.runtime.kernels.bitmask import bits_of  # needs Triton

        bits = bits_of(matrix, K)
        return [bits.values, bits.mask, bits.rows, bits.blocks, bits.scale]
    words = matrix.bits == 4 and not (matrix.group % WORDS and _is_grouped(matrix))
    scale = ones if matrix.scale is None else matrix.scale.contiguous()
    if isinstance(matrix, PackedDense):
        if not words:
            return [matrix.codes.contiguous(), scale]
        from slimfx.runtime.kernels.portable_int4 import words_4

        return [words_4(matrix, K).words, scale]
    if not words:
        return [matrix.values.contiguous(), matrix.indices.contiguous(), scale]
    from slimfx.runtime.kernels.portable_24 import words_24

    made_24 = words_24(matrix, K)
    return [made_24.words, made_24.places, scale]


def _device(matrix: PackedMatrix) -> torch.device:
    return matrix.codes.device if isinstance(matrix, PackedDense) else matrix.values.device


def _is_grouped(matrix: PackedMatrix) -> bool:
    return matrix.scale is not None and matrix.scale.shape[1] > 1


def read_fragments(tensors: Sequence[Tensor], form: Form, N: int, K: int) -> Fragments:
    """The matrix [N, K] that two tensors are, as the decode kernels take it."""
    data, scale = tensors
    return Fragments(data, scale, form.where, N, K, form.group or K)


def read_stored(tensors: Sequence[Tensor], form: Form, K: int) -> Any:
    """The matrix [N, K] that tensors of the layout "stored" are, as `expand` takes it."""
    group = form.group or K
    if form.where == "floats":
        return tensors[0]
    if form.where == "bitmask":
        from slimfx.runtime.kernels.bitmask import Bits

        kept, mask, rows, blocks, scale = tensors
        return Bits(kept, kept.nbytes, mask, rows, blocks, scale, form.bits, K, group)
    values, scale = list(tensors[:-1]), tensors[-1]
    if values[0].dtype is not torch.int32:
        last = None if form.bits == FLOAT_BITS else scale
        kind: Any = PackedDense if form.where == "dense" else Packed24
        return kind(*values, last, form.bits, group)
    if form.where == "dense":
        from slimfx.runtime.kernels.portable_int4 import Words4

        return Words4(values[0], scale, K, group)
    from slimfx.runtime.kernels.portable_24 import Words24

    return Words24(values[0], values[1], scale, K, group)


def dense_weight(
    tensors: Sequence[Tensor], form: Form, N: int, K: int, layout: str, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] that a layout stands for: what every kernel is compared with."""
    if form.where == "floats":
        return tensors[0].to(dtype)
    if layout == "fragments":
        return fragments.dense_weight(read_fragments(tensors, form, N, K), dtype)
    raw = [t.view(torch.uint8) if t.dtype in (torch.int32, torch.int16) else t for t in tensors]
    if form.where == "bitmask":
        values, scale = unpack_bitmask(raw[0], raw[1], form.bits, K), tensors[4]
    elif form.where == "dense":
        values, scale = unpack_codes(raw[0], form.bits, K), tensors[1]
    else:
        values, scale = unpack_24(raw[0], raw[1], form.bits, K), tensors[2]
    scale = scale.to(dtype)
    if form.group:
        scale = scale.repeat_interleave(form.group, dim=1)[:, :K]
    return values.to(dtype) * scale
