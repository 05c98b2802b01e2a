"""How many bytes of activations are alive at once while the nodes of a block run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node


def live_bytes(
    nodes: Sequence[Node], kept: Collection[Node], given: Collection[Node], sizes: Mapping[Any, int]
) -> int:
    """The most at once; `given` are there from the start, `kept` stay to the end.

    `sizes`: the size that each symbol of the graph's shapes has. A view takes nothing itself, and
    keeps what it views.
    """
    owner: dict[Node, Node] = {}
    for node in nodes:
        source = next(iter(node.all_input_nodes), None)
        owner[node] = owner.get(source, source) if source and _is_view(node) else node
    last = {owner.get(source, source): node for node in nodes for source in node.all_input_nodes}
    stays = {owner.get(node, node) for node in kept}
    now = most = sum(_bytes(node, sizes) for node in given)
    for node in nodes:
        now += _bytes(node, sizes) if owner[node] is node else 0
        most = max(most, now)
        used = {owner.get(source, source) for source in node.all_input_nodes}
        now -= sum(_bytes(s, sizes) for s in used & owner.keys() - stays if last[s] is node)
    return most


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _bytes(node: Node, sizes: Mapping[Any, int]) -> int:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    count = value.element_size()
    for size in value.shape:
        count *= size if isinstance(size, int) else _size(size, sizes)
    return count


def _size(size: torch.SymInt, sizes: Mapping[Any, int]) -> int:
    found = size.node.expr.subs(sizes)
    if found.is_number:
        return int(found)
    hint = size.node.hint  # none where the size is known at run time alone: all rows, at most
    return math.prod(sizes.values()) if hint is None else int(hint)
