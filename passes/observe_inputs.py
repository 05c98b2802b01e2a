"""Choose the tensors to take statistics of: one for all linears that read the same input."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from slimfx.passes.find_linears import Site
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
_SHAPE_ONLY = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.contiguous.default,
    aten.clone.default,
}


@dataclass(frozen=True)
class Observation:
    """Watch `node`, whose last dimension is the input width; `masked`: its rows follow the
    attention mask.
    """

    node: Node
    masked: bool
    sites: tuple[str, ...]


def observe_inputs(program: ExportedProgram, sites: tuple[Site, ...]) -> list[Observation]:
    """One observation for each distinct input tensor of the given sites."""
    mask = next((n for n in program.graph.nodes if n.name == "attention_mask"), None)
    readers: dict[Node, list[str]] = defaultdict(list)
    for site in sites:
        for use in site.uses:
            names = readers[_source(use.x)]
            if site.name not in names:
                names.append(site.name)
    return [
        Observation(node, mask is not None and _rows(node) == _shape(mask), tuple(names))
        for node, names in readers.items()
    ]


def _source(x: Node) -> Node:
    """Step back over nodes that only change the shape in front of the last dimension."""
    while x.target in _SHAPE_ONLY and isinstance(x.args[0], Node):
        before, after = _shape(x.args[0]), _shape(x)
        if not before or before[-1] != after[-1]:
            break
        x = x.args[0]
    return x


def _rows(node: Node) -> tuple:
    return _shape(node)[:-1]


def _shape(node: Node) -> tuple:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else ()
