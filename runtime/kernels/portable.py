"""How the portable kernels are launched: x, parts of K, adapters, sums.

    y = x W^T + z R^T + bias, z = x L^T of adapters

A program takes 64 rows of the weight, or fewer that are of one linear, up to 64 of x, and its own
turns of both sums, those of R after those of W. Sums are float32; where programs share them, a last
kernel adds theirs in order. Each kind of weight has a kernel, which turns stored bytes into tiles.
"""

# Jitted functions are Triton's language: constants are annotations.
# mypy: disable-error-code="name-defined"

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from slimfx.runtime.kernels.launch import PARTS, starts_of
from torch import Tensor

from slimfx.errors import SlimError, need

triton: Any = need("triton")
tl: Any = need("triton.language")

BLOCK = 128
"""Inputs of a row that a kernel takes in a turn, unless groups are shorter."""
_ROWS = (64, 32, 16)
"""Of a weight, for a program: the first that ends where linears do."""
_HALF = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class How:
    """How to launch a product.

    Args:
        split: parts of the turns that run side by side; None for as many as keep the GPU busy.
        prmt: permute bytes by PTX; None to do so on NVIDIA.
        stages: turns whose inputs of x are held at once, one of them multiplied; None for three on
            NVIDIA, else one.
    """

    split: int | None = None
    prmt: bool | None = None
    stages: int | None = None


@dataclass(frozen=True)
class Operand:
    """A weight [N, K] as `product` launches a kernel on it; `constants` are the kernel's own."""

    tensors: tuple[Tensor, ...]
    scale: Tensor
    N: int
    K: int
    group: int
    constants: Mapping[str, Any]

    @property
    def scale_row(self) -> int:
        """From the scales of a row to those of the next."""
        return self.scale.shape[1] if self.scale.shape[0] > 1 else 0

    @property
    def scaled_by(self) -> int:
        """Inputs that share a scale, 0 if all do."""
        return self.group if self.scale.shape[1] > 1 else 0


@dataclass(frozen=True)
class Low:
    """What adapters add to a product: z R^T, of each linear its own.

    Args:
        z: [..., linears r], x L^T in the dtype of x.
        R: [N, r], dense codes of four bits.
        rows: of each linear, multiples of 16 but the last.
    """

    z: Tensor
    R: Operand
    rows: Sequence[int]


def product(
    kernel: Any,
    x: Tensor,
    weight: Operand,
    bias: Tensor | None,
    how: How | None,
    low: Low | None = None,
) -> Tensor:
    """x W^T [+ z R^T] + bias by a kernel with the arguments of `portable_int4.product_kernel`.

    Raises:
        SlimError: x has another width or a dtype that no kernel multiplies.
    """
    how, N, K, scale = how or How(), weight.N, weight.K, weight.scale
    if x.dtype not in (*_HALF, torch.float32) or x.shape[-1] != K:
        raise SlimError(
            f"portable product: x is {x.dtype} {tuple(x.shape)}, the weight takes bfloat16, "
            f"float16 or float32 [..., {K}]; convert x first"
        )
    y = x.new_empty(*x.shape[:-1], N)
    if not y.numel():
        return y
    rows, BK = _halves(x), block_of(scale, weight.group)
    arguments, constants, turns = _of_adapters(low, rows, scale)
    turns += triton.cdiv(K, BK)
    M, BN = rows.shape[0], _rows_of(low)
    BM = 16 if M <= 16 else 32 if M <= 32 else 64
    grid = (triton.cdiv(N, BN), triton.cdiv(M, BM))
    split = how.split or _split(x.device, grid, turns)
    whole = split == 1 and M * N == y.numel()
    out = y if whole else x.new_empty(split, M, N, dtype=torch.float32)
    nvidia = x.is_cuda and torch.version.hip is None
    kernel[(grid[0], split, grid[1])](
        *(rows, *weight.tensors, scale, scale if bias is None else bias, out),
        *(M, N, K, triton.cdiv(turns, split), weight.scale_row, *arguments),
        GROUP=weight.scaled_by,
        HALF=_HALF[rows.dtype],
        BIAS=whole and bias is not None,
        PRMT=nvidia if how.prmt is None else how.prmt,
        **{"BM": BM, "BN": BN, "BK": BK, **weight.constants, **constants},
        **{"num_warps": BN // 16, "num_stages": how.stages or (3 if nvidia else 1)},
    )
    if not whole:
        add_parts(out, bias, y)
    return y


def _halves(x: Tensor) -> Tensor:
    """The rows of x in 16 bits; of float32 three bfloat16 [3 M, K] whose sum it is: codes are exact
    in bfloat16.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype is not torch.float32:
        return rows.contiguous()
    high = rows.bfloat16()
    rest = rows - high
    middle = rest.bfloat16()
    return torch.cat([(rest - middle).bfloat16(), middle, high])


def _rows_of(low: Low | None) -> int:
    """Rows of the weight for a program, all of one linear if those have adapters."""
    ends = [] if low is None else low.rows[:-1]
    return next(BN for BN in _ROWS if all(N % BN == 0 for N in ends))


def _of_adapters(
    low: Low | None, x: Tensor, scale: Tensor
) -> tuple[list[Any], dict[str, Any], int]:
    """A kernel's arguments of adapters, anything where there are none; its constants; and turns."""
    if low is None:
        constants = {"LOW": False, "R_GROUP": 0, "R_BK": BLOCK}
        return [x, x, scale, 0, 0, 0, *starts_of([])], constants, 0
    R, (words,), z = low.R, low.R.tensors, _halves(low.z)
    torch._check(
        len(low.rows) <= PARTS
        and all(N % _ROWS[-1] == 0 for N in low.rows[:-1])
        and sum(low.rows) == R.N
        and tuple(z.shape) == (x.shape[0], len(low.rows) * R.K),
        lambda: (
            f"portable product: z is {tuple(low.z.shape)}, R [{R.N}, {R.K}], which does not fit "
            f"rows {list(low.rows)}: up to {PARTS}, multiples of {_ROWS[-1]}"
        ),
    )
    constants = {"LOW": True, "R_GROUP": R.scaled_by, "R_BK": block_of(R.scale, R.group)}
    turns = -(-R.K // int(constants["R_BK"]))
    return [z, words, R.scale, R.K, z.shape[1], R.scale_row, *starts_of(low.rows)], constants, turns


def block_of(scale: Tensor, group: int) -> int:
    """Inputs that a kernel takes in a turn: 128, or what divides that and the groups."""
    grouped = scale.shape[1] > 1 and group % 16 == 0
    return math.gcd(group, BLOCK) if grouped else BLOCK


def _split(device: torch.device, grid: tuple[int, int], steps: int) -> int:
    """Parts of K, of four turns at least, so that there are two programs a multiprocessor: one
    computes while another waits for memory.
    """
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // (grid[0] * grid[1]), steps // 4))


def add_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [..., N] becomes the sum of float32 parts, each of its size, in order, and of the bias."""
    width = 1024
    _add_parts[(triton.cdiv(y.numel(), width),)](
        *(parts, parts if bias is None else bias, y, y.numel(), y.shape[-1]),
        COUNT=parts.numel() // y.numel(),
        BIAS=bias is not None,
        BLOCK=width,
    )


def as_words(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as integers, copied unless they begin where sixteen of them may be read at once."""
    stored = stored.contiguous()
    apart = stored.data_ptr() % 16 or stored.storage_offset() % dtype.itemsize
    return (stored.clone() if apart else stored).view(dtype)


def check_sizes(
    kernel: str, arrays: Mapping[Tensor, int], scale: Tensor | None, group: int, K: int
) -> None:
    """Refuse arrays of other widths, and scales of other shapes, than a weight [N, K] has: what a
    kernel reads past their ends is anything.
    """
    N = next(iter(arrays)).shape[0]
    for stored, width in arrays.items():
        if tuple(stored.shape) != (N, width):
            raise SlimError(
                f"{kernel}: {tuple(stored.shape)} for a weight [{N}, {K}], not [{N}, {width}]; "
                f"pack it again"
            )
    if scale is None:
        return
    groups = -(-K // group)
    if scale.dim() != 2 or scale.shape[0] not in (1, N) or scale.shape[1] not in (1, groups):
        raise SlimError(
            f"{kernel}: scale {tuple(scale.shape)} for a weight [{N}, {K}] in groups of {group}; "
            f"pack it again"
        )


def check_group(kernel: str, scale: Tensor, group: int, unit: int = 16) -> None:
    """Refuse groups that end within what the kernel multiplies at once."""
    if scale.shape[1] > 1 and group % unit:
        raise SlimError(
            f"{kernel}: groups of {group} inputs, not a multiple of {unit}; use expand.prefill for "
            f"these"
        )


@triton.jit
def share(N, K, steps, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """What a program takes: rows of the weight and of x; the former as they may be read; all turns
    of W, its own first of them, and the one behind its last.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1).to(tl.int64)  # what lies past the last row is not stored
    turns = tl.cdiv(K, BK)
    first = tl.program_id(1) * steps
    return n, m, row, turns, first, tl.minimum(first + steps, turns)


@triton.jit
def add_product(tile, x, scale, acc, GROUP: tl.constexpr):
    """acc [n, m] + tile [n, k] x [k, m], times the scale of the tile's groups if it has them."""
    if GROUP > 0:
        return acc + tl.dot(tile, x) * scale.to(tl.float32)[:, None]
    else:
        return tl.dot(tile, x, acc)


@triton.jit
def scaled(acc, scale, row, scale_row, GROUP: tl.constexpr):
    """acc [n, m] times the scale of a row if it has only one."""
    if GROUP == 0:
        acc *= tl.load(scale + row * scale_row).to(tl.float32)[:, None]
    return acc


@triton.jit
def put(acc, n, m, bias, y, M, N, BIAS: tl.constexpr):
    """Store acc [n, m] as y [split, M, N], plus the bias."""
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    part = tl.program_id(1).to(tl.int64) * M
    at = y + (part + m)[None, :] * N + n[:, None]
    tl.store(at, acc.to(y.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _add_parts(
    parts, bias, y, size, N, COUNT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(COUNT):
        total += tl.load(parts + tl.cast(i, tl.int64) * size + at, mask=at < size, other=0)
    if BIAS:
        total += tl.load(bias + at % N, mask=at < size, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)
