"""What compression takes of memory at its worst moment, block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from slimfx.passes.base import input_specs
from slimfx.passes.cut_blocks import Block, cut_blocks
from slimfx.passes.find_linears import Site
from slimfx.passes.inputs import input_names, tensor_inputs
from slimfx.passes.measure_live import live_bytes
from slimfx.passes.observe_inputs import observe_inputs
from slimfx.recipe import Calibration
from slimfx.steps import LayerRecipe

_CAPTURED = 160_000_000
"""transformers and what torch.export keeps of a program, as measured on a Llama of 22 layers."""
_SOLVING = 28
"""Bytes a weight that a solver works in: seven float32 matrices, as measured on SLiM's steps."""
_PACKING = 12
"""Bytes a weight that packing a layer works in: a position of eight bytes and a value, about."""
_COVARIANCES = 5
"""Matrices [K, K] in float32 that a solver makes of a covariance, about; not measured."""


@dataclass(frozen=True)
class Layer:
    """A linear that is compressed, and what it comes to."""

    site: Site
    how: LayerRecipe
    bytes_after: int

    @property
    def weights(self) -> int:
        """N K."""
        return self.site.out_features * self.site.in_features

    @property
    def solution(self) -> int:
        """Bytes of codes, one for each value, and of the adapter before it is packed."""
        adapter = self.how.adapter
        rank = adapter.rank_for(self.site.out_features, self.site.in_features) if adapter else 0
        width = 2 if self.how.quantize is None else 1
        return width * self.weights + 2 * rank * (self.site.out_features + self.site.in_features)


def peak_memory(program: ExportedProgram, layers: list[Layer], how: Calibration) -> int:
    """Bytes above those of the whole program, if it is in memory: of a block whose weights are
    read, whose inputs are observed, whose layers are solved and packed.
    """
    named = {layer.site.name: layer for layer in layers}
    sizes, rows = batch_sizes(program, how)
    most = 0
    for block in cut_blocks(program, [layer.site for layer in layers]):
        own = [named[site.name] for site in block.sites]
        most = max(most, _block_bytes(program, block, own, sizes, rows))
        if layers and own[-1:] == layers[-1:]:
            break  # nothing behind it is run
    return _CAPTURED + most


def _block_bytes(
    program: ExportedProgram,
    block: Block,
    layers: list[Layer],
    sizes: dict[Any, int],
    rows: int,
) -> int:
    lifted = set(input_specs(program)) - set(input_names(program))
    outside = {source for node in block.nodes for source in node.all_input_nodes}
    outside -= set(block.nodes)
    read = {node for node in outside if node.name in lifted}
    weights = sum(node.meta["val"].nbytes for node in read)
    live = live_bytes(block.nodes, block.live_out, outside - read, sizes)
    widest = max((layer.site.in_features for layer in layers), default=0)
    squares = [4 * width**2 for width in _covariances(program, block, layers)]
    passing = weights + live + 2 * 4 * rows * widest + 2 * sum(squares) + max(squares, default=0)
    solving = max((_SOLVING * layer.weights for layer in layers), default=0)
    solving += sum(squares) + _COVARIANCES * max(squares, default=0)
    largest = max((layer.weights for layer in layers), default=0)
    behind = weights + sum(layer.bytes_after for layer in layers) + max(_PACKING * largest, live)
    solved = sum(layer.solution for layer in layers)
    return max(passing, solved + max(solving, behind + sum(squares)))


def _covariances(program: ExportedProgram, block: Block, layers: list[Layer]) -> list[int]:
    """The widths of the inputs whose X^T X is summed."""
    full = {layer.site.name: layer.site for layer in layers if layer.how.needs_covariance}
    watched = observe_inputs(program, block.sites, set(block.nodes)) if full else []
    return [
        full[names[0]].in_features
        for watch in watched
        if (names := [name for name in watch.sites if name in full])
    ]


def batch_sizes(program: ExportedProgram, how: Calibration) -> tuple[dict[Any, int], int]:
    """The symbols of a text program's shapes in calibration, and the tokens of a batch."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    ids = tensor_inputs(program).get("input_ids")
    if ids is None or len(ids.sizes) != 2:
        return {}, 1
    wanted = (how.batch, min(how.length, ids.sizes[1][1] or how.length))
    shape = nodes["input_ids"].meta["val"].shape
    pairs = zip(shape, wanted, strict=True)
    return {s.node.expr: n for s, n in pairs if isinstance(s, torch.SymInt)}, math.prod(wanted)
