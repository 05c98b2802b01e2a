"""The weights of a compressed model on its way through torch.compile, laid out for the kernels
once for every graph, recompiled ones among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from slimfx.passes import lower_gpu
from slimfx.passes.compressed_linears import Sized
from slimfx.passes.lower_cpu import Lowered, lay_out, lower_graph
from slimfx.passes.lower_gpu import LoweredGpu
from slimfx.runtime.pack import PackedMatrix
from slimfx.runtime.select import Gpu
from slimfx.writes import Mark


def lay_out_(
    gm: GraphModule, example_inputs: Sequence[Any], *, rounded: bool, gpu: Gpu | None = None
) -> tuple[Lowered | LoweredGpu, list[Mark]]:
    """Give a graph of stored weights, which Dynamo made inputs, constants as the kernels read.

    Args:
        gpu: where it will run; None for CPUs.

    Returns what became of its linears, and marks of the stored tensors it read.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    stored = dict(zip(placeholders, example_inputs, strict=True))
    marks: list[Mark] = []

    def constant(like: Node, name: str, tensor: Tensor) -> Node:
        unique = f"{like.name}_{name}"
        gm.register_buffer(unique, tensor)
        gm._param_name_to_source[unique] = ConstantSource(unique)  # type: ignore[operator,index,assignment]
        with gm.graph.inserting_after(placeholders[-1]):
            node = gm.graph.get_attr(unique)
        mode = like.meta["example_value"].fake_mode
        node.meta["example_value"] = mode.from_tensor(tensor, static_shapes=True)
        return node

    def make_gpu(
        like: Node, name: str, matrices: Sequence[Sized], how: Callable[..., Sequence[Tensor]]
    ) -> list[Node]:
        laid = _laid_out(matrices, name, how)
        marks.extend(laid.marks)
        return [constant(like, f"{name}_{i}", tensor) for i, tensor in enumerate(laid.tensors)]

    def make(like: Node, name: str, matrices: Sequence[Sized]) -> tuple[Node, Node]:
        data, scale = make_gpu(like, name, matrices, lay_out)
        return data, scale

    report: Lowered | LoweredGpu
    if gpu is None:
        report = lower_graph(gm.graph, stored.get, make, rounded=rounded)
    else:
        report = lower_gpu.lower_graph(gm.graph, stored.get, make_gpu, gpu)
    gm.recompile()
    return report, marks


@dataclass(frozen=True)
class _Laid:
    """Stored tensors as they were, in which layout, and the tensors that it has of them."""

    marks: tuple[Mark, ...]
    layout: str
    tensors: tuple[Tensor, ...]


_LAID: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Stored tensor -> the `_Laid` that begin with it, for other graphs and recompiled ones."""


def _laid_out(
    matrices: Sequence[Sized], layout: str, how: Callable[..., Sequence[Tensor]]
) -> _Laid:
    """What `how` makes of matrices, but once for the same tensors and layout."""
    tensors = [tensor for matrix, _ in matrices for tensor in _tensors(matrix)]
    known = [
        laid
        for laid in _LAID.get(tensors[0], ())
        if all(mark.fits(mark.tensor()) for mark in laid.marks)
    ]
    for laid in known:
        same = [id(mark.tensor()) for mark in laid.marks] == [id(tensor) for tensor in tensors]
        if same and laid.layout == layout:
            return laid
    marks = tuple(Mark.of(tensor, watch=True) for tensor in tensors)
    laid = _Laid(marks, layout, tuple(how(matrices)))
    _LAID[tensors[0]] = [*known, laid]
    return laid


def _tensors(matrix: PackedMatrix | Tensor) -> list[Tensor]:
    parts = [matrix] if isinstance(matrix, Tensor) else list(vars(matrix).values())
    return [part for part in parts if isinstance(part, Tensor)]
