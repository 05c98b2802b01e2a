"""Walk a program block by block: watch what reaches the linears, then move on, compressed.

The state between blocks is, for each batch, the values later blocks still read. Block i + 1
therefore sees the output of the compressed block i. Of several processes each has some batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from slimfx.errors import CalibrationError
from slimfx.methods.stats import Stats, add_tokens, empty_stats, merge, unreached_stats
from slimfx.passes.base import input_specs, lifted_tensor, written_nodes
from slimfx.passes.cut_blocks import Block
from slimfx.passes.find_linears import storage_key
from slimfx.passes.inputs import flat_inputs, input_names
from slimfx.passes.observe_inputs import Observation
from slimfx.ranks import ALONE, Ranks, attempt, shares
from slimfx.runtime.unread import read_value

Values = dict[Node, Any]


@dataclass(frozen=True)
class Walk:
    """A program on its way through calibration: its tensors, each batch's live values and mask."""

    program: ExportedProgram
    lifted: Values
    batches: dict[int, Values]
    """By the number of the batch: those of this process."""
    masks: dict[int, Tensor | None]
    shares: list[range]
    """All batches, cut into runs; run i is that of process i modulo their number."""
    ranks: Ranks = ALONE
    halved: bool = False
    """Are float32 values between blocks kept in bfloat16?"""

    def told(self, number: int, work: Callable[[], Any]) -> Any:
        """What `work` comes to in the process of that batch, in every process."""
        [run] = [i for i, share in enumerate(self.shares) if number in share]
        mine = number in self.batches
        return self.ranks.told(run % self.ranks.size, attempt(work) if mine else None)


def start(
    program: ExportedProgram,
    batches: Sequence[Any],
    ranks: Ranks = ALONE,
    *,
    halved: bool = False,
) -> Walk:
    """Stand before the first block, with the batches that are this process's.

    Raises:
        CalibrationError: there is no batch.
    """
    if not batches:
        raise CalibrationError("no calibration batch was given; one is the least")
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    lifted = {
        nodes[name]: lifted_tensor(program, spec)
        for name, spec in input_specs(program).items()
        if spec.kind is not InputKind.USER_INPUT
    }
    users = [nodes[name] for name in input_names(program)]
    cut = shares(len(batches))
    values = {
        i: dict(zip(users, flat_inputs(program, batches[i]), strict=True))
        for share in cut[ranks.own :: ranks.size]
        for i in share
    }
    masks = {
        i: next((v for n, v in each.items() if n.name == "attention_mask"), None)
        for i, each in values.items()
    }
    return Walk(program, lifted, values, masks, cut, ranks, halved)


def read_block(walk: Walk, block: Block) -> Walk:
    """The same walk with what the block takes read, if it was left unread.

    Raises:
        ArtifactError: a file cannot be read.
    """
    taken = {source for node in block.nodes for source in node.all_input_nodes}
    found = {node: read_value(walk.lifted[node]) for node in taken & walk.lifted.keys()}
    return replace(walk, lifted={**walk.lifted, **found})


@torch.no_grad()
def observe(
    walk: Walk, block: Block, watched: Sequence[Observation], covariance: frozenset[str]
) -> dict[str, Stats]:
    """Run a block as it is, up to its last watched input, and return the statistics of each site.

    `covariance` names the sites whose statistics need X^T X. Those of a site that no token reached
    say so, and take all its inputs alike.

    Raises:
        CalibrationError: an input is NaN or infinite; names the layer.
    """
    block = observed(block, watched)
    walk = read_block(walk, block)
    totals: dict[str, Stats] = {}
    for found in walk.ranks.each(
        walk.shares, lambda share: _sums(walk, block, watched, covariance, share)
    ):
        for name, sums in found.items():
            totals[name] = merge(totals[name], sums) if name in totals else sums
    sites: dict[str, Stats] = {}
    for watch in watched:
        total = totals[watch.node.name]
        for name in watch.sites:
            _check(name, total)
            sites[name] = merge(sites[name], total) if name in sites else total
    return {
        name: found if found.tokens else unreached_stats(found) for name, found in sites.items()
    }


def observed(block: Block, watched: Sequence[Observation]) -> Block:
    """The block up to the last of what is watched, without its last linear, among others."""
    nodes = {watch.node for watch in watched}
    last = max((i for i, node in enumerate(block.nodes) if node in nodes), default=-1)
    return replace(block, nodes=block.nodes[: last + 1])


def _sums(
    walk: Walk,
    block: Block,
    watched: Sequence[Observation],
    covariance: frozenset[str],
    numbers: Iterable[int],
) -> dict[str, Stats]:
    """The statistics of some batches at each watched node, by its name."""
    watches = {watch.node: watch for watch in watched}
    stats: dict[str, Stats] = {}

    def watch(node: Node, x: Tensor, mask: Tensor | None) -> None:
        rows = _rows(x, mask, watches[node].mask)
        if node.name not in stats:
            full = not covariance.isdisjoint(watches[node].sites)
            stats[node.name] = empty_stats(rows.shape[1], rows.device, covariance=full)
        stats[node.name] = add_tokens(stats[node.name], rows)

    for i in numbers:
        seen = partial(watch, mask=walk.masks[i])
        run_batch(walk, block, i, keep=frozenset(), watch=dict.fromkeys(watches, seen))
    return stats


@torch.no_grad()
def advance(
    walk: Walk, block: Block, weights: Mapping[str, Tensor]
) -> Iterator[tuple[int, Values]]:
    """Run a block with other weights (parameter name -> tensor): each batch's values behind it."""
    changed = read_block(with_weights(walk, weights), block)  # what is replaced is not read
    for i in walk.batches:
        values = run_batch(changed, block, i, keep=block.live_out)
        yield i, {node: _halved(value) for node, value in values.items()} if walk.halved else values


def with_weights(walk: Walk, weights: Mapping[str, Tensor]) -> Walk:
    """The same walk with other weights (parameter name -> tensor).

    A weight is replaced wherever its storage is read, whatever name it has there.
    """
    state = walk.program.state_dict
    swaps = {storage_key(state[fqn], fqn): tensor for fqn, tensor in weights.items()}
    specs = input_specs(walk.program)

    def now(node: Node, value: Any) -> Any:
        own = lifted_tensor(walk.program, specs[node.name])  # one that was read is another tensor
        if not isinstance(own, Tensor):
            return value
        return swaps.get(storage_key(own, str(specs[node.name].target)), value)

    return replace(walk, lifted={node: now(node, value) for node, value in walk.lifted.items()})


def run_batch(
    walk: Walk,
    block: Block,
    number: int,
    keep: frozenset[Node],
    watch: Mapping[Node, Callable[[Node, Tensor], None]] | None = None,
) -> Values:
    """`run` on a batch; random operations draw the same whenever it goes through the block, and
    in whatever process.
    """
    with torch.random.fork_rng():
        first = block.nodes[0].name if block.nodes else ""  # of none, nothing is drawn
        torch.manual_seed(zlib.crc32(f"{first} {number}".encode()))
        return run(walk, block, walk.batches[number], keep, watch)


def run(
    walk: Walk,
    block: Block,
    values: Values,
    keep: frozenset[Node],
    watch: Mapping[Node, Callable[[Node, Tensor], None]] | None = None,
) -> Values:
    """Interpret the block's nodes and return the values in `keep`; others go at their last use.

    `watch` is called with a node's value as soon as it is there. Tensors that the block changes in
    place are copies, so that it can be run again. Gradients are kept as the caller has it.
    """
    written = written_nodes(block.nodes)
    env = {node: read_value(value) for node, value in values.items()}
    if walk.halved:
        env = {node: _whole(node, value) for node, value in env.items()}
    env |= {node: _copy(value) for node, value in env.items() if node in written}
    last_use = {source: node for node in block.nodes for source in node.all_input_nodes}
    inside, watch = set(block.nodes), watch or {}

    def value(node: Node) -> Any:
        if node not in env:
            if node not in written:
                return walk.lifted[node]
            env[node] = _copy(walk.lifted[node])
        return env[node]

    for node in [n for n in watch if n not in inside]:
        watch[node](node, value(node))
    for node in block.nodes:
        if node.op == "get_attr":
            env[node] = _attribute(walk.program.graph_module, str(node.target))
            continue
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if node in watch:
            watch[node](node, env[node])
        for source in node.all_input_nodes:
            if source in inside and last_use[source] is node and source not in keep:
                del env[source]
    return {node: env[node] for node in keep if node in env}


def _halved(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.to(torch.bfloat16) if floats else value


def _whole(node: Node, value: Any) -> Any:
    """A value in the type that its node has, if it was kept in another."""
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return value.to(dtype) if isinstance(value, Tensor) and dtype is not None else value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _attribute(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name)
    return root


def _rows(x: Tensor, mask: Tensor | None, alignment: str) -> Tensor:
    """The token rows [tokens, K] of an input, without padding."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or not alignment:
        return rows
    return rows[(mask if alignment == "rows" else mask.T).reshape(-1) != 0]


def _check(name: str, stats: Stats) -> None:
    if not (stats.square_sum.isfinite().all() and stats.peak.isfinite().all()):
        channels = int((~stats.peak.isfinite()).sum())
        raise CalibrationError(
            f"{name}: its input is NaN or infinite in {channels} of {len(stats.peak)} channels; "
            f"check the weights before it, or capture the model in float32"
        )
