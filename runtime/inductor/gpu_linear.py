"""Lowering of `linear_gpu`: a Triton template that multiplies by stored bytes, or the op itself.

The template is the portable kernel for one weight of four bits without adapters. What follows the
op, an added bias or residual or an activation, is fused into its store. Inductor measures it beside
the op as it is, which launches what `select` chooses. Everything else is the op as it is: decode
kernels end in sums of parts and take tiles of L on the way, and adapters are not in the template.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from slimfx.runtime import gpu_ops
from slimfx.runtime.gpu_ops import Held, forms
from slimfx.runtime.select import PORTABLE_ROWS, Form
from torch._inductor import config, ir, lowering
from torch._inductor.select_algorithm import (
    ExternKernelChoice,
    SymbolicGridFn,
    TritonTemplate,
    autotune_select_algorithm,
    realize_inputs,
)

_BLOCK = 128
_DTYPES = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}

_SOURCE = r"""
{{def_kernel(NAMES)}}
    M = {{size("X", 0)}}
    N = {{size("W", 0)}}
    K = {{size("X", 1)}}
    pid = tl.program_id(0)
    grid_n = tl.cdiv(N, BN)
    m = pid // grid_n * BM + tl.arange(0, BM)
    n = pid % grid_n * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)
    at = row[:, None] * {{stride("W", 0)}} + tl.arange(0, BK // PER)[None, :]
    k = tl.arange(0, BK)
    here = X + tl.minimum(m, M - 1).to(tl.int64)[None, :] * {{stride("X", 0)}} + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for i in range(0, tl.cdiv(K, BK)):
        xt = tl.load(here, mask=(k < K)[:, None], other=0)
        s = tl.load(S + row * SCALE_ROW + i * BK // GROUP) if GROUP > 0 else 1.0
        tile = TILE
        acc = add_product(tile, xt, s, acc, GROUP)
        at += BK // PER
        here += BK
        k += BK
    acc = scaled(acc, S, row, SCALE_ROW, GROUP)
    idx_m = m[None, :]
    idx_n = n[:, None]
    mask = (idx_m < M) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BN", "BM"))}}

from slimfx.runtime.kernels.portable import add_product, scaled
from slimfx.runtime.kernels.portable_int4 import tile_4
from slimfx.runtime.kernels.portable_24 import tile_24
"""
_TILES = {
    "dense": ('"X", "W", "S"', "tile_4(tl.load(W + at), HALF, PRMT)"),
    "2:4": (
        '"X", "W", "P", "S"',
        "tile_24(tl.load(W + at), tl.load(P + at).to(tl.int32), HALF, PRMT)",
    ),
}
_NAMES = {"dense": "slimfx_portable_int4", "2:4": "slimfx_portable_24"}


@SymbolicGridFn
def _grid(M: Any, N: Any, meta: Any, *, cdiv: Any) -> tuple[Any, Any, Any]:
    """A program for each block of the output."""
    return cdiv(M, meta["BM"]) * cdiv(N, meta["BN"]), 1, 1


@functools.cache
def template(where: str) -> TritonTemplate:
    """The one of a kind of weight; Inductor knows templates by their names."""
    names, tile = _TILES[where]
    source = _SOURCE.replace("NAMES", names).replace("TILE", tile, 1)
    return TritonTemplate(name=_NAMES[where], grid=_grid, source=source)


@functools.cache
def _extern() -> ExternKernelChoice:
    return ExternKernelChoice(_as_op, name="slimfx_linear_gpu", has_out_variant=False)


def _as_op(x: Any, *stored: Any, form: list[int], rows: list[int], rank: int) -> Any:
    return gpu_ops.OP(x, [], list(stored), form, rows, rank)


@dataclass(frozen=True)
class Blocks:
    """Rows of x and of the weight that a program takes, and the inputs of a turn."""

    BM: int
    BN: int
    BK: int


def why_no_template(held: Held, x: torch.dtype, M: int | None) -> str | None:
    """Why an op is left as it is, or None if there is a template for M rows of x."""
    weight = held.forms[0]
    reasons = (
        (held.rank > 0, "it has adapters, which the template does not take"),
        (weight.where not in _TILES or weight.bits != 4, f"no template reads {weight}"),
        (not len(held.stored), "its weight is laid out for the decode kernels alone"),
        (x not in _DTYPES, f"x is {x}, not bfloat16 or float16"),
        (bool(weight.group % 16), f"groups of {weight.group} inputs, not a multiple of 16"),
        (len(held.fragments) > 0, "it chooses its kernel by the rows that x has"),
        (M is None, "the rows of x vary, and it chooses its kernel by them"),
        ((M or 0) > PORTABLE_ROWS, f"above {PORTABLE_ROWS} rows of x the weight is expanded once"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def blocks(M: int, form: Form) -> list[Blocks]:
    """What Inductor may try, the kernel's own choice first."""
    BM = 16 if M <= 16 else 32 if M <= 32 else 64
    BK = min(_BLOCK, form.group & -form.group) if form.group else _BLOCK
    return [Blocks(BM, BN, BK) for BN in ((64, 32) if M <= 32 else (128, 64))]


def lower_linear_gpu(
    x: Any,
    fragments: Sequence[Any],
    stored: Sequence[Any],
    form: Sequence[int],
    rows: Sequence[int],
    rank: int,
) -> Any:
    """The op's IR node, on x as [M, K]."""
    batch, K = x.get_size()[:-1], x.get_size()[-1]
    M = functools.reduce(lambda a, b: a * b, batch, sympy.Integer(1))
    held = Held(fragments, stored, forms([int(n) for n in form]), [int(n) for n in rows], int(rank))
    count = int(M) if sympy.sympify(M).is_Integer else None
    known = x.get_device().type == "cuda" or config.cpu_backend == "triton"
    if not known or count == 0 or why_no_template(held, x.get_dtype(), count) is not None:
        fallback = lowering.fallback_handler(gpu_ops.OP, add_to_fallback_set=False)
        return fallback(x, fragments, stored, form, rows, rank)
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [M, sum(held.rows)])
    view = lowering.view(x, [M, K])
    nodes = [ir.ExternKernel.require_contiguous(n) for n in realize_inputs(view, *stored)]
    choices: list[Any] = []
    for each in blocks(count or PORTABLE_ROWS, held.forms[0]):
        _append(choices, nodes, layout, held, each)
    if layout.device.type == "cuda":  # elsewhere there is nothing to measure either on
        numbers = {"form": list(map(int, form)), "rows": list(held.rows), "rank": held.rank}
        choices.append(_extern().bind(nodes, layout, **numbers))
    else:
        del choices[1:]
    chosen = autotune_select_algorithm("linear_gpu", choices, nodes, layout)
    y = chosen[0] if isinstance(chosen, tuple) else chosen  # a bare node before torch 2.13
    return lowering.view(y, [*batch, sum(held.rows)])


def _append(choices: list[Any], nodes: list[Any], layout: Any, held: Held, how: Blocks) -> None:
    """One more choice: the template with some blocks."""
    weight = held.forms[0]
    scale: Any = held.stored[-1]
    nvidia = layout.device.type == "cuda" and torch.version.hip is None
    refused = template(weight.where).maybe_append_choice(
        choices,
        input_nodes=nodes,
        layout=layout,
        num_stages=3 if nvidia else 1,
        num_warps=max(2, how.BN // 16),
        **{"BM": how.BM, "BN": how.BN, "BK": how.BK, "GROUP": weight.group},
        PER=16 if weight.where == "2:4" else 8,
        HALF=_DTYPES[layout.dtype],
        PRMT=nvidia,
        SCALE_ROW=int(scale.get_size()[1]) if scale.get_size()[0] != 1 else 0,
    )
    if refused is not None:
        raise AssertionError(f"linear_gpu: Inductor refused a template: {refused}")
