"""Choose the tensors to take statistics of: one for all linears that read the same input."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
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
    """Watch `node`, whose last dimension is the input width."""

    node: Node
    mask: str
    """How the attention mask [batch, sequence] runs along its rows: "rows", "columns" where the
    model keeps the sequence first, "" where it says nothing of them."""
    sites: tuple[str, ...]

    @property
    def masked(self) -> bool:
        """Are padding rows left out?"""
        return bool(self.mask)


def observe_inputs(
    program: ExportedProgram, sites: tuple[Site, ...], within: Collection[Node] | None = None
) -> list[Observation]:
    """One observation for each distinct input tensor of the sites.

    `within`: the nodes of the block that is run, which the watched nodes behind a change of shape
    must belong to.
    """
    mask = next((n for n in program.graph.nodes if n.name == "attention_mask"), None)
    readers: dict[Node, list[str]] = defaultdict(list)
    for site in sites:
        for use in site.uses:
            names = readers[_sources(use.x, within)[-1]]
            if site.name not in names:
                names.append(site.name)
    return [
        Observation(node, "" if mask is None else _alignment(node, _shape(mask)), tuple(names))
        for node, names in readers.items()
    ]


def _sources(x: Node, within: Collection[Node] | None = None) -> list[Node]:
    """x, and behind it what only changes shape in front of the last dimension, nearest first."""
    found = [x]
    while x.target in _SHAPE_ONLY and isinstance(x.args[0], Node):
        before, after = _shape(x.args[0]), _shape(x)
        outside = within is not None and x.args[0] not in within
        if outside or not before or before[-1] != after[-1]:
            break
        x = x.args[0]
        found.append(x)
    return found


def _alignment(node: Node, mask: tuple[str, ...]) -> str:
    for source in _sources(node):
        if _shape(source)[:-1] == mask:
            return "rows"
        if _shape(source)[:-1] == mask[::-1]:
            return "columns"
    before = source.args[0] if source.target in _SHAPE_ONLY else None
    if isinstance(before, Node) and _joins_heads(_shape(before), _shape(source)):
        return {mask: "rows", mask[::-1]: "columns"}.get(_shape(before)[:2], "")
    return ""


def _joins_heads(before: tuple[str, ...], after: tuple[str, ...]) -> bool:
    """Does a reshape [a, b, heads, width] -> [..., heads * width] keep the rows as they were?"""
    if len(before) < 4 or not all(size.isdigit() for size in before[2:]):
        return False
    return after[-1] == str(math.prod(map(int, before[2:])))


def _shape(node: Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else ()
