"""Lowering of `linear_gpu`: Triton templates that multiply by stored bytes, or the op itself.

A template is the portable kernel for a weight of four bits, with or without what int4 adapters add;
x L^T is one more. What follows the op, an added bias or residual or an activation, is fused into
its store. In a program that is compiled as it runs, Inductor measures the template beside the op as
it is, which launches what `select` chooses; with adapters, for rows that vary and for decode
kernels it is the op alone. A package has nothing but templates: no Python is there to launch.
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
from torch._inductor.virtualized import V

from slimfx.errors import SlimError

_BLOCK = 128
_DTYPES = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}

_SOURCE = r"""
{{def_kernel(NAMES)}}
    M = {{size("X", 0)}}
    N = {{size("W", 0)}}
    K = {{size("X", 1)}}
    steps = tl.cdiv(K, BK) + R_TURNS
    n, m, row, turns, first, last = share(N, K, steps, BM, BN, BK)
    at = row[:, None] * {{stride("W", 0)}} + tl.arange(0, BK // PER)[None, :]
    k = tl.arange(0, BK)
    here = X + tl.minimum(m, M - 1).to(tl.int64)[None, :] * {{stride("X", 0)}} + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for i in range(first, last):
        xt = tl.load(here, mask=(k < K)[:, None], other=0)
        s = tl.load(S + row * SCALE_ROW + i * BK // GROUP) if GROUP > 0 else 1.0
        tile = TILE
        acc = add_product(tile, xt, s, acc, GROUP)
        at += BK // PER
        here += BK
        k += BK
    acc = scaled(acc, S, row, SCALE_ROW, GROUP)
    LOW
    idx_m = m[None, :]
    idx_n = n[:, None]
    mask = (idx_m < M) & (idx_n < N)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BN", "BM"))}}

from slimfx.runtime.kernels.portable import add_product, scaled, share
from slimfx.runtime.kernels.portable_int4 import add_low, tile_4
from slimfx.runtime.kernels.portable_24 import tile_24
"""
_LOW = r"""acc = add_low(
        acc, row, m, Z, R, T, M, turns, steps, RANK, {{stride("Z", 0)}}, R_SCALE_ROW, N1, N2, N3,
        R_GROUP, HALF, PRMT, BN, R_BK,
    )"""
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
    return cdiv(N, meta["BN"]), 1, cdiv(M, meta["BM"])


@functools.cache
def template(where: str, low: bool) -> TritonTemplate:
    """The one of a kind of weight, with what adapters add if `low`; Inductor knows templates by
    their names.
    """
    names, tile = _TILES[where]
    source = _SOURCE.replace("NAMES", names + ', "Z", "R", "T"' * low)
    source = source.replace("TILE", tile, 1).replace("    LOW\n", f"    {_LOW}\n" * low, 1)
    return TritonTemplate(name=_NAMES[where] + "_low" * low, grid=_grid, source=source)


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


def why_no_template(held: Held, x: torch.dtype) -> str | None:
    """Why no template multiplies by what an op holds, or None if there is one."""
    weight = held.forms[0]
    reasons = (
        (weight.where not in _TILES or weight.bits != 4, f"no template reads {weight}"),
        (not len(held.stored), "its weight is laid out for the decode kernels alone"),
        (x not in _DTYPES, f"x is {x}, not bfloat16 or float16"),
        *(
            (form.group % 16 > 0, f"groups of {form.group} inputs, not a multiple of 16")
            for form in held.forms
        ),
        *(
            ((form.where, form.bits) != ("dense", 4), f"no template adds adapters of {form}")
            for form in held.forms[1:]
        ),
    )
    return next((reason for holds, reason in reasons if holds), None)


def why_the_op(held: Held, M: int | None) -> str | None:
    """Why the op is better as it is where it can be launched, or None."""
    reasons = (
        (held.rank > 0, "it has adapters, whose x L^T it launches itself"),
        (len(held.fragments) > 0, "it chooses its kernel by the rows that x has"),
        (M is None, "the rows of x vary, and it chooses its kernel by them"),
        ((M or 0) > PORTABLE_ROWS, f"above {PORTABLE_ROWS} rows of x the weight is expanded once"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def blocks(M: int, form: Form, ends: Sequence[int] = ()) -> list[Blocks]:
    """What Inductor may try, the kernel's own choice first.

    Args:
        ends: rows of linears that a program's rows may not go beyond, multiples of 16.
    """
    BM = 16 if M <= 16 else 32 if M <= 32 else 64
    BK = _turn(form)
    fits = [BN for BN in (128, 64, 32, 16) if all(end % BN == 0 for end in ends)]
    most = 64 if M <= 32 else 128
    return [Blocks(BM, BN, BK) for BN in fits if BN <= most][:2]


def _turn(form: Form) -> int:
    return min(_BLOCK, form.group & -form.group) if form.group else _BLOCK


def lower_linear_gpu(
    x: Any,
    fragments: Sequence[Any],
    stored: Sequence[Any],
    form: Sequence[int],
    rows: Sequence[int],
    rank: int,
) -> Any:
    """The op's IR node, on x as [M, K].

    Raises:
        SlimError: no template multiplies by it, and a package is compiled.
    """
    batch, K = x.get_size()[:-1], x.get_size()[-1]
    M = functools.reduce(lambda a, b: a * b, batch, sympy.Integer(1))
    held = Held(fragments, stored, forms([int(n) for n in form]), [int(n) for n in rows], int(rank))
    count = int(M) if sympy.sympify(M).is_Integer else None
    reason = why_no_template(held, x.get_dtype())
    if V.graph.aot_mode and reason is not None:
        raise SlimError(f"linear_gpu: {reason}")
    known = x.get_device().type == "cuda" or config.cpu_backend == "triton"
    as_it_is = None if V.graph.aot_mode else why_the_op(held, count)
    if not known or count == 0 or reason is not None or as_it_is is not None:
        fallback = lowering.fallback_handler(gpu_ops.OP, add_to_fallback_set=False)
        return fallback(x, fragments, stored, form, rows, rank)
    x = lowering.view(x, [M, K])
    weight, *adapters = held.tensors("stored")
    if adapters:
        L, R = adapters
        low = (_product(x, L, held.forms[1], rank * len(held.rows)), R)
        y = _product(x, weight, held.forms[0], sum(held.rows), low, held)
    else:
        y = _product(x, weight, held.forms[0], sum(held.rows), held=held)
    return lowering.view(y, [*batch, sum(held.rows)])


def _product(
    x: Any,
    stored: Sequence[Any],
    form: Form,
    N: int,
    low: tuple[Any, Sequence[Any]] | None = None,
    held: Held | None = None,
) -> Any:
    """x W^T [M, N], with z R^T of the adapters that `held` has added for `low`, which is z and R.

    Without adapters the op that holds the weight is a choice, too, where it can be launched.
    """
    M = x.get_size()[0]
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [M, N])
    inputs = [x, *stored] if low is None else [x, *stored, low[0], *low[1]]
    nodes = [ir.ExternKernel.require_contiguous(n) for n in realize_inputs(*inputs)]
    choices: list[Any] = []
    rows = int(M) if sympy.sympify(M).is_Integer else PORTABLE_ROWS
    for each in blocks(rows, form, [] if low is None or held is None else held.rows[:-1]):
        _append(choices, nodes, layout, form, each, stored[-1], held if low else None)
    if layout.device.type != "cuda":  # there is nothing to measure on
        del choices[1:]
    elif held is not None and low is None and not V.graph.aot_mode:
        numbers = {"form": list(form.numbers()), "rows": list(held.rows), "rank": 0}
        choices.append(_extern().bind(nodes, layout, **numbers))
    chosen = autotune_select_algorithm("linear_gpu", choices, nodes, layout)
    return chosen[0] if isinstance(chosen, tuple) else chosen  # a bare node before torch 2.13


def _append(
    choices: list[Any],
    nodes: list[Any],
    layout: Any,
    form: Form,
    how: Blocks,
    scale: Any,
    adapted: Held | None,
) -> None:
    """One more choice: the template with some blocks."""
    nvidia = layout.device.type == "cuda" and torch.version.hip is None
    refused = template(form.where, adapted is not None).maybe_append_choice(
        choices,
        input_nodes=nodes,
        layout=layout,
        num_stages=3 if nvidia else 1,
        num_warps=max(2, how.BN // 16),
        **{"BM": how.BM, "BN": how.BN, "BK": how.BK, "GROUP": form.group},
        PER=16 if form.where == "2:4" else 8,
        HALF=_DTYPES[layout.dtype],
        PRMT=nvidia,
        SCALE_ROW=_scale_row(scale),
        **_of_adapters(adapted, nodes[-1]),
    )
    if refused is not None:
        raise AssertionError(f"linear_gpu: Inductor refused a template: {refused}")


def _scale_row(scale: Any) -> int:
    """From the scales of a row to those of the next, 0 if all rows have the same."""
    return int(scale.get_size()[1]) if scale.get_size()[0] != 1 else 0


def _of_adapters(held: Held | None, scale: Any) -> dict[str, int]:
    """The template's constants of R, whose scales are given."""
    if held is None:
        return {"R_TURNS": 0}
    from slimfx.runtime.kernels.launch import starts_of  # needs Triton

    form = held.forms[2]
    starts = dict(zip(("N1", "N2", "N3"), starts_of(held.rows), strict=True))
    turns = -(-held.rank // _turn(form))
    own = {"RANK": held.rank, "R_TURNS": turns, "R_BK": _turn(form), "R_GROUP": form.group}
    return {**own, "R_SCALE_ROW": _scale_row(scale), **starts}
