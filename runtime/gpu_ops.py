"""The op of compressed linears on GPUs: weights, adapters and neighbours that read the same x.

    linear_gpu  y = [x W_1^T + (x L_1^T) R_1^T, x W_2^T + (x L_2^T) R_2^T, ...]

Matrices are as `gpu_layout` lays them out. The reference here is the definition, with x L^T rounded
to the dtype of x, as every kernel does; on CUDA devices the op launches what `select` chooses for
the rows that x has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from slimfx.runtime.gpu_layout import COUNT, dense_weight, read_fragments, read_stored
from slimfx.runtime.select import SPARSE_ROWS, WHERE, Form, Gpu, Layer, gpu_of, select
from torch import Tensor
from torch.nn.functional import linear

from slimfx.errors import SlimError

_LIBRARY = torch.library.Library("slimfx", "FRAGMENT")
_FIELDS = 3
_NAMES = ("weight", "L", "R")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Held:
    """What `linear_gpu` multiplies by: the matrices in each layout that was made of them."""

    fragments: Sequence[Tensor]
    stored: Sequence[Tensor]
    forms: tuple[Form, ...]
    rows: Sequence[int]
    rank: int

    @property
    def layouts(self) -> tuple[str, ...]:
        """Those that were made."""
        made = {"fragments": self.fragments, "stored": self.stored}
        return tuple(name for name, tensors in made.items() if len(tensors))

    def sizes(self, K: int) -> list[tuple[int, int]]:
        """[N, K] of each matrix."""
        N = sum(self.rows)
        return [(N, K), (self.rank * len(self.rows), K), (N, self.rank)][: len(self.forms)]

    def tensors(self, layout: str) -> list[Sequence[Tensor]]:
        """Those of each matrix."""
        every = self.fragments if layout == "fragments" else self.stored
        return split(every, self.forms, layout)


def forms(numbers: Sequence[int]) -> tuple[Form, ...]:
    """One `Form` for each matrix: weight, then L and R if there are any."""
    fields = [numbers[i : i + _FIELDS] for i in range(0, len(numbers), _FIELDS)]
    return tuple(Form(WHERE[where], bits, group) for where, bits, group in fields)


def split(tensors: Sequence[Tensor], kinds: Sequence[Form], layout: str) -> list[Sequence[Tensor]]:
    """The tensors of each matrix."""
    found, start = [], 0
    for form in kinds:
        count = 2 if layout == "fragments" and form.where != "floats" else COUNT[form.where]
        found.append(tensors[start : start + count])
        start += count
    torch._check(
        start == len(tensors),
        lambda: f"linear_gpu: {len(tensors)} tensors of {layout} for {len(kinds)} matrices",
    )
    return found


def linear_gpu(
    x: Tensor,
    fragments: Sequence[Tensor],
    stored: Sequence[Tensor],
    form: Sequence[int],
    rows: Sequence[int],
    rank: int,
) -> Tensor:
    """y [..., sum(rows)] for x [..., K].

    Args:
        fragments: weight, L and R in this layout, or nothing if it was not made.
        stored: the same in the other layout; at least one of them is there.
        form: three numbers for each matrix, `Form.numbers`.
        rows: N of each part; multiples of 16 but the last.
        rank: r of every part, 0 without adapters.
    """
    held = _checked(x, fragments, stored, form, rows, rank)
    layout, K = held.layouts[-1], x.shape[-1]
    wide = x if x.dtype is torch.float64 else x.to(torch.float32)
    W, *adapters = (
        dense_weight(tensors, form, *size, layout, wide.dtype)
        for tensors, form, size in zip(held.tensors(layout), held.forms, held.sizes(K))
    )
    y = linear(wide, W)
    if adapters:
        L, R = adapters
        z = linear(wide, L).to(x.dtype).to(wide.dtype)
        y = y + torch.cat(
            [linear(a, b) for a, b in zip(z.split(rank, -1), R.split(list(rows)))], -1
        )
    return y.to(x.dtype)


def _checked(
    x: Tensor,
    fragments: Sequence[Tensor],
    stored: Sequence[Tensor],
    form: Sequence[int],
    rows: Sequence[int],
    rank: int,
) -> Held:
    torch._check(x.dtype in _FLOATS, lambda: f"linear_gpu: x is {x.dtype}, not one of {_FLOATS}")
    torch._check(
        len(form) == _FIELDS * (3 if rank else 1) and len(rows) > 0,
        lambda: f"linear_gpu: {len(form)} numbers of form, {len(rows)} parts, rank {rank}",
    )
    torch._check(
        len(rows) == 1 or all(N % 16 == 0 for N in (*rows[:-1], rank)),
        lambda: f"linear_gpu: rows {rows} of its parts, rank {rank}, not multiples of 16",
    )
    held = Held(fragments, stored, forms(form), rows, rank)
    torch._check(bool(held.layouts), lambda: "linear_gpu: the weight has no layout")
    K = x.shape[-1]
    for layout in held.layouts:
        for i, tensors in enumerate(held.tensors(layout)):
            _check_size(_NAMES[i], layout, tensors, held.forms[i], *held.sizes(K)[i])
    return held


def _check_size(
    name: str, layout: str, tensors: Sequence[Tensor], form: Form, N: int, K: int
) -> None:
    """Refuse a matrix that a kernel would read beyond."""
    scale = tensors[-1]
    if layout == "fragments" and form.where != "floats":
        blocks, words = (-(-K // 256), 384) if form.where == "2:4" else (-(-K // 64), 128)
        width = 256 * blocks if form.where == "2:4" else 64 * blocks
        wanted = [
            (torch.int32, (-(-N // 16), blocks * words)),
            (torch.bfloat16, (-(-N // 16), -(-width // form.group) if form.group else 1, 16)),
        ]
        found = [(t.dtype, tuple(t.shape)) for t in tensors]
        torch._check(
            found == wanted,
            lambda: f"linear_gpu: {name} is {found} in fragments, not {wanted}",
        )
        return
    first = tensors[1] if form.where == "bitmask" else tensors[0]
    torch._check(
        first.dim() == 2 and first.shape[0] == N,
        lambda: f"linear_gpu: {name} is {tuple(first.shape)}, not of {N} rows",
    )
    if form.where == "floats":
        torch._check(
            first.shape[1] == K, lambda: f"linear_gpu: {name} is {tuple(first.shape)}, not [, {K}]"
        )
        return
    groups = -(-K // form.group) if form.group else 1
    torch._check(
        scale.dim() == 2 and scale.shape[0] in (1, N) and scale.shape[1] == groups,
        lambda: f"linear_gpu: {name} has {tuple(scale.shape)} scales, not [{N}, {groups}]",
    )
    width = _stored_width(first.dtype, form, K)
    torch._check(
        first.shape[1] * (first.itemsize if form.where == "bitmask" else 1) == width,
        lambda: f"linear_gpu: {name} is {tuple(first.shape)}, not [{N}, {width}]",
    )


def _stored_width(dtype: torch.dtype, form: Form, K: int) -> int:
    """Numbers in a row of codes or values of a matrix in the layout "stored", bytes of a mask."""
    if form.where == "bitmask":
        return -(-K // 128) * 16
    if dtype is torch.int32:
        return -(-K // 128) * (8 if form.where == "2:4" else 16)
    kept = K // 2 if form.where == "2:4" else K
    return kept if dtype is torch.bfloat16 else -(-kept * form.bits // 8)


def _fake(
    x: Tensor,
    fragments: Sequence[Tensor],
    stored: Sequence[Tensor],
    form: Sequence[int],
    rows: Sequence[int],
    rank: int,
) -> Tensor:
    _checked(x, fragments, stored, form, rows, rank)
    return x.new_empty(*x.shape[:-1], sum(rows))


def _on_cuda(
    x: Tensor,
    fragments: Sequence[Tensor],
    stored: Sequence[Tensor],
    form: Sequence[int],
    rows: Sequence[int],
    rank: int,
) -> Tensor:
    held = _checked(x, fragments, stored, form, rows, rank)
    return launch(x, held, gpu_of(x.device))


def launch(x: Tensor, held: Held, gpu: Gpu) -> Tensor:
    """The op by the kernel that `select` chooses; in Triton's interpreter also on CPUs.

    Raises:
        SlimError: there is no kernel, with all reasons; Triton is not installed.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not flat.shape[0]:
        return x.new_empty(*x.shape[:-1], sum(held.rows))
    layer = Layer(held.forms[0], held.forms[1:], x.dtype)
    choice = select(layer, flat.shape[0], gpu, layouts=held.layouts)
    if choice.kernel is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in choice.why_not.items())
        raise SlimError(
            f"linear_gpu: no kernel for {flat.shape[0]} rows of x, {x.dtype}; {reasons}"
        )
    decode = choice.kernel.startswith("decode")
    run = _decode if decode else _expand if choice.kernel == "expand" else _portable
    return run(flat, held).view(*x.shape[:-1], -1)


def _decode(x: Tensor, held: Held) -> Tensor:
    """Up to 64 rows of x on tensor cores."""
    from slimfx.runtime.kernels.decode import decode, decode_parts  # they need Triton

    sizes = held.sizes(x.shape[-1])
    matrices: list[Any] = [
        tensors[0] if form.where == "floats" else read_fragments(tensors, form, *size)
        for tensors, form, size in zip(held.tensors("fragments"), held.forms, sizes)
    ]
    in_codes = all(form.where != "floats" for form in held.forms)
    if in_codes and held.rank and (len(held.rows) == 1 or held.rank % 16 == 0):
        return decode_parts(x, matrices[0], matrices[1], matrices[2], held.rows)

    def times(x: Tensor, i: int, W: Any) -> Tensor:
        return linear(x, W.to(x.dtype)) if isinstance(W, Tensor) else decode(x, W)

    y = decode(x, matrices[0])
    return _adapted_(y, x, matrices[1:], held, times)


def _portable(x: Tensor, held: Held) -> Tensor:
    """On any GPU, x L^T and then the rest; a product for each matrix if adapters are not int4."""
    from slimfx.runtime.kernels.bitmask import bitmask
    from slimfx.runtime.kernels.portable_24 import portable_24
    from slimfx.runtime.kernels.portable_int4 import low_of, portable_int4

    products: dict[str, Any] = {"dense": portable_int4, "2:4": portable_24, "bitmask": bitmask}

    def times(x: Tensor, i: int, W: Any) -> Tensor:
        where = held.forms[i].where
        return linear(x, W.to(x.dtype)) if where == "floats" else products[where](x, W)

    W, *adapters = _stored(x, held)
    if adapters and all(form.where == "dense" for form in held.forms[1:]):
        L, R = adapters
        return cast(Tensor, products[held.forms[0].where](x, W, low=low_of(x, L, R, held.rows)))
    return _adapted_(times(x, 0, W), x, adapters, held, times)


def _expand(x: Tensor, held: Held) -> Tensor:
    """Dense weights, and the library's products; for many rows of x one that skips zeros."""
    from slimfx.runtime.kernels.expand import expand
    from slimfx.runtime.kernels.expand_cslt import expand_cslt, multiply, why_not
    from slimfx.runtime.kernels.portable_24 import Words24

    def dense(matrix: Any, K: int) -> Tensor:
        return matrix.to(x.dtype) if isinstance(matrix, Tensor) else expand(matrix, K, x.dtype)

    (weight, *adapters), sizes, rows = _stored(x, held), held.sizes(x.shape[-1]), list(held.rows)
    skips = isinstance(weight, Words24) and x.shape[0] >= SPARSE_ROWS
    if skips and why_not(*sizes[0], x.dtype, x.device) is None:
        y = multiply(expand_cslt(weight, x.shape[-1], x.dtype), x)
    else:
        y = linear(x, dense(weight, x.shape[-1]))
    if adapters:
        L, R = (dense(matrix, K) for matrix, (_, K) in zip(adapters, sizes[1:]))
        low = linear(x, L).split(held.rank, -1)
        for part, z, second in zip(y.split(rows, -1), low, R.split(rows)):
            part.addmm_(z, second.T)
    return y


def _stored(x: Tensor, held: Held) -> list[Any]:
    sizes, tensors = held.sizes(x.shape[-1]), held.tensors("stored")
    return [read_stored(t, form, K) for t, form, (_, K) in zip(tensors, held.forms, sizes)]


def _adapted_(
    y: Tensor,
    x: Tensor,
    adapters: Sequence[Any],
    held: Held,
    times: Callable[[Tensor, int, Any], Tensor],
) -> Tensor:
    """y with (x L^T) R^T added to each part; `times(x, i, W)` is x W^T for matrix i."""
    if adapters:
        L, R = adapters
        start, low = 0, times(x, 1, L).split(held.rank, -1)
        for z, N in zip(low, held.rows):
            y[:, start : start + N] += times(z, 2, _rows(R, start, N, sum(held.rows)))
            start += N
    return y


def _rows(matrix: Any, start: int, count: int, N: int) -> Any:
    """Some rows of a matrix [N, K] in the layout "stored"."""
    if count == N:
        return matrix
    if isinstance(matrix, Tensor):
        return matrix[start : start + count]
    parts = {name: value for name, value in vars(matrix).items() if isinstance(value, Tensor)}
    cut = {name: t[start : start + count] for name, t in parts.items() if t.shape[0] == N}
    return replace(matrix, **cut)


_LIBRARY.define(
    "linear_gpu(Tensor x, Tensor[] fragments, Tensor[] stored, int[] form, int[] rows, int rank) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear_gpu", linear_gpu, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_gpu", _on_cuda, "CUDA")
torch.library.register_fake("slimfx::linear_gpu", _fake, lib=_LIBRARY)

OP = torch.ops.slimfx.linear_gpu.default
"""As nodes of a graph call it."""
