"""Cut a graph into the blocks that calibration walks through, one after the other.

A block is a run of nodes inside the same member of a numbered container (`layers.3`), read from
`nn_module_stack`; what stands between two members is a block of its own. Blocks that share a weight
are joined, since a weight is solved once, from all its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from slimfx.passes.find_linears import Site, module_path
from torch.export import ExportedProgram
from torch.fx import Node


@dataclass(frozen=True)
class Block:
    """Consecutive nodes, the sites solved in them, and the values later blocks still read."""

    name: str
    nodes: tuple[Node, ...]
    sites: tuple[Site, ...]
    live_out: frozenset[Node]


def cut_blocks(program: ExportedProgram, sites: list[Site]) -> list[Block]:
    """Blocks in execution order that cover every node but placeholders and the output."""
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    spans = _join_shared(_spans(nodes), nodes, sites)
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    blocks = []
    for name, start, stop in spans:
        inside = nodes[start:stop]
        members = set(inside)
        end = position[inside[-1]]
        live = {
            n for n in position if position[n] <= end and any(position[u] > end for u in n.users)
        }
        owned = tuple(s for s in sites if any(use.node in members for use in s.uses))
        blocks.append(Block(name, tuple(inside), owned, frozenset(live)))
    return blocks


def _spans(nodes: list[Node]) -> list[tuple[str, int, int]]:
    """Runs of equal member path; a short run outside any member joins it when both sides agree."""
    keys = [_member(module_path(node)) for node in nodes]
    runs: list[list] = []
    for i, key in enumerate(keys):
        if runs and runs[-1][0] == key:
            runs[-1][2] = i + 1
        elif len(runs) > 1 and runs[-1][0] == "" and runs[-2][0] == key:
            runs.pop()
            runs[-1][2] = i + 1
        else:
            runs.append([key, i, i + 1])
    return [(key, start, stop) for key, start, stop in runs]


def _member(path: str) -> str:
    """ "model.layers.3.mlp" -> "model.layers.3"; "" outside numbered containers."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _join_shared(
    spans: list[tuple[str, int, int]], nodes: list[Node], sites: list[Site]
) -> list[tuple[str, int, int]]:
    index = {node: i for i, node in enumerate(nodes)}
    span_of = [s for s, (_, start, stop) in enumerate(spans) for _ in range(start, stop)]
    last = list(range(len(spans)))  # span -> the last span it must be solved with
    for site in sites:
        touched = sorted(span_of[index[use.node]] for use in site.uses)
        last[touched[0]] = max(last[touched[0]], touched[-1])
    joined = []
    i = 0
    while i < len(spans):
        end = i
        reach = last[i]
        while end < reach:
            end += 1
            reach = max(reach, last[end])
        joined.append((spans[i][0], spans[i][1], spans[end][2]))
        i = end + 1
    return joined
