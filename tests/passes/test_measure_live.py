"""measure_live: what is alive at once, by hand."""

from __future__ import annotations

import torch
from models import normal
from slimfx.passes.measure_live import live_bytes
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import relu

import slimfx


class Wide(nn.Module):
    """x [n, 8] -> [n, 32] -> relu -> [n, 8], a view between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(relu(self.up(x)).unsqueeze(0).squeeze(0))


def test_the_most_is_where_the_wide_ones_meet() -> None:
    program = slimfx.capture(
        Wide(), (normal(1, 4, 8),), dynamic_shapes={"x": {0: Dim("n", min=2, max=64)}}
    )
    [x] = [n for n in program.graph.nodes if n.name == "x"]
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    [symbol] = [size.node.expr for size in x.meta["val"].shape if isinstance(size, torch.SymInt)]
    for rows in (4, 10):
        row = 4 * rows
        assert live_bytes(nodes, [], [x], {symbol: rows}) == row * (8 + 32 + 32)
        assert live_bytes(nodes[-1:], [], [], {symbol: rows}) == row * 8
        wide = [n for n in nodes if "relu" in str(n.target)]
        assert live_bytes(nodes, wide, [x], {symbol: rows}) == row * (8 + 32 + 32)
        assert live_bytes(nodes[:2], nodes[:2], [], {symbol: rows}) == row * 64
