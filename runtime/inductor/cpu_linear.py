"""Lowering of `linear_cpu`: a C++ template around `linear.h`, compiled into the artifact.

What follows the op, an added bias or residual or an activation, is fused into the store of a tile.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sympy
import torch
from slimfx.runtime.cpu_ops import Form, forms, groups
from slimfx.runtime.interleave import LANES, whole
from torch._inductor import ir, lowering
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.select_algorithm import autotune_select_algorithm, realize_inputs
from torch._inductor.virtualized import V

_WIDTH = 32
"""Columns that `linear.h` hands over at a time."""
CONSTANTS = {"dense": "DENSE", "2:4": "TWO_FOUR", "bitmask": "BITMASK"}

_SOURCE = r"""
{{template.header().getvalue()}}
{{library}}
extern "C"
{{kernel.def_kernel(inputs=inputs, outputs={"Y": Y}, aliases=aliases)}}
{
  using namespace slimfx;
  const int64_t M = {{kernel.size(template_out, 0)}};
  const Part parts[] = {
{%- for part in parts %}
    {{part}},
{%- endfor %}
  };
  slimfx::linear<{{stored}}, {{rounded}}>(X, M, {{K}}, parts, {{parts|length}},
      [&](int64_t m0, int64_t rows, int64_t n0, int64_t width, float* acc) {
    const int64_t m1 = m0 + rows, n1 = n0 + width;
{%- set tile = kernel.slice_nd(local, [("0", "m1 - m0"), ("0", "n1 - n0")]) %}
{%- set tile_Y = kernel.slice_nd(Y_2d, [("m0", "m1"), ("n0", "n1")]) %}
    {{ kernel.store_output(tile_Y, tile, template_out, epilogue_nodes, offsets=("m0", "n0"),
                           reindexers=reindexers)|indent(4, false) }}
  });
}
"""


@functools.cache
def library() -> str:
    """The source of every kernel."""
    return (Path(__file__).parent / "linear.h").read_text(encoding="utf-8")


class LinearTemplate(CppTemplate):
    """`inputs` by name, x first, in the order of the op; the rest are its constants."""

    def __init__(
        self,
        inputs: dict[str, Any],
        layout: ir.Layout,
        *,
        K: int,
        kinds: Sequence[Form],
        rows: Sequence[int],
        ranks: Sequence[int],
        rounded: bool,
    ) -> None:
        super().__init__("linear_cpu", list(inputs.values()), layout, 1)
        self.names = tuple(inputs)
        self.K, self.kinds, self.rows, self.ranks = K, kinds, rows, ranks
        self.rounded = rounded

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[Any] | None = None,
        **_: Any,
    ) -> str:
        """The C++ source, with the nodes that Inductor fuses behind the op in its store."""
        out: Any = self.output_node if template_buffer_node is None else template_buffer_node
        store = _Store(out, bool(flag_template_buffer_has_other_users), epilogue_nodes or [])
        inputs = dict(zip(self.names, self.input_nodes))
        names = [f"Stored<{CONSTANTS[kind.where]}, {kind.bits}>" for kind in self.kinds]
        acc = ir.Buffer(
            name="acc",
            layout=ir.FixedLayout(torch.device("cpu"), torch.float32, [out.get_size()[0], _WIDTH]),
        )
        kernel.local_buffers["acc"] = acc
        with contextlib.ExitStack() as stack:
            for fake in store.fakes:
                patched = patch.object(V.graph, "get_dtype", self._fake_get_dtype(fake))
                stack.enter_context(patched)
            return self._template_from_string(_SOURCE).render(
                template=self,
                kernel=kernel,
                library=library(),
                inputs=inputs,
                K=self.K,
                parts=self._parts(inputs),
                stored=", ".join(names if len(names) == 3 else names * 3),
                rounded="true" if self.rounded else "false",
                local=acc,
                Y=store.Y,
                Y_2d=store.Y_2d,
                template_out=store.template_out,
                aliases=store.aliases,
                epilogue_nodes=store.epilogues,
                reindexers=store.reindexers,
            )

    def _parts(self, inputs: dict[str, Any]) -> list[str]:
        """The C++ initialiser of every part."""
        K, found = self.K, []
        at = {"W": [0, 0], "L": [0, 0], "R": [0, 0]}
        start = hidden = 0
        for i, N in enumerate(self.rows):
            weight = _matrix("W", self.kinds[0], N, K, at["W"], inputs)
            first = second = "{}"
            rank = 0
            if self.ranks:
                rank = whole(self.ranks[i])
                first = _matrix("L", self.kinds[1], rank, K, at["L"], inputs)
                second = _matrix("R", self.kinds[2], N, rank, at["R"], inputs)
            found.append(f"{{{start}, {N}, {hidden}, {rank}, {weight}, {first}, {second}}}")
            start, hidden = start + N, hidden + rank
        return found


def _matrix(name: str, form: Form, N: int, K: int, at: list[int], inputs: dict[str, Any]) -> str:
    """The C++ initialiser of a matrix that begins at byte and scale `at`, which it moves on."""
    tiles = whole(N) // LANES
    if form.where == "bitmask":
        size = int(inputs[name].get_size()[0]) // tiles
    else:
        size = form.tile_bytes(K)
    group = min(form.group, whole(K))
    data, scale = f"{name} + {at[0]}", f"(const uint16_t*){name}_scale + {at[1]}"
    at[0] += tiles * size
    at[1] += tiles * groups(form, K) * LANES
    return f"{{{data}, {scale}, {whole(K)}, {group}, {size}}}"


class _Store:
    """How Inductor wants the result written: through the nodes fused behind the template."""

    def __init__(self, out: Any, has_other_users: bool, nodes: list[Any]) -> None:
        self.Y = self.Y_2d = self.template_out = out
        self.epilogues: list[Any] = []
        self.reindexers: list[Any] = []
        self.fakes: list[Any] = []
        aliases: list[str] = []
        if has_other_users:  # a first node copies the tile to the buffer that they read
            self.template_out = ir.Buffer(name=f"{out.get_name()}_tile", layout=out.layout)
            copy = ir.Pointwise(
                device=out.get_device(),
                dtype=out.get_dtype(),
                inner_fn=self.template_out.make_loader(),
                ranges=out.get_size(),
            )
            self.epilogues.append(
                ir.ComputedBuffer(name=out.get_name(), layout=out.layout, data=copy)
            )
            self.reindexers.append(None)
            self.fakes.append(self.template_out)
            aliases.append(self.template_out.get_name())
        elif nodes:
            aliases.append(out.get_name())
        if nodes:
            self.epilogues.extend(nodes)
            self.Y = nodes[-1]
            self.Y_2d, self.reindexers = gen_2d_view_of_epilogue_buf(
                self.Y, out, nodes, self.reindexers, default_reindexers=[None] * len(nodes)
            )
        self.aliases = {name: self.Y.get_name() for name in aliases}


def lower_linear_cpu(
    x: Any,
    weight: Any,
    scale: Any,
    L: Any,
    L_scale: Any,
    R: Any,
    R_scale: Any,
    form: Sequence[int],
    rows: Sequence[int],
    ranks: Sequence[int],
    rounded: bool = False,
) -> Any:
    """The op's IR node, on x as [M, K]."""
    batch, K = x.get_size()[:-1], V.graph.sizevars.guard_int(x.get_size()[-1])
    M = functools.reduce(lambda a, b: a * b, batch, sympy.Integer(1))
    N = sum(rows)
    if M == 0:  # Inductor has no views of nothing
        return lowering.full([*batch, N], 0, dtype=x.get_dtype(), device=x.get_device())
    named = {"X": lowering.view(x, [M, K]), "W": weight, "W_scale": scale}
    if L is not None:
        named |= {"L": L, "L_scale": L_scale, "R": R, "R_scale": R_scale}
    nodes = [ir.ExternKernel.require_contiguous(node) for node in realize_inputs(*named.values())]
    inputs = dict(zip(named, nodes))
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [M, N])
    choices: list[Any] = []
    template = LinearTemplate(
        inputs,
        layout,
        K=K,
        kinds=forms([int(number) for number in form]),
        rows=[int(N) for N in rows],
        ranks=[int(r) for r in ranks],
        rounded=bool(rounded),
    )
    template.maybe_append_choice(choices)
    if not choices:
        raise AssertionError("linear_cpu: Inductor took no template")
    chosen = autotune_select_algorithm("linear_cpu", choices, nodes, layout)
    y = chosen[0] if isinstance(chosen, tuple) else chosen  # a bare node before torch 2.13
    return lowering.view(y, [*batch, N])
