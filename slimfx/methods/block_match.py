"""The last pass over a block: its adapters and scales, codes as they are, fitted to its outputs.

    W ~ scale exp(s) Q + R L,     s, L, R learned

A layer's own error says nothing of what the rest of the block does with it; gradients through the
block do. Rounding stays inside the loop (straight through), so that what is learned is what is
stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimfx.methods.learnable import Learnable, Values, in_bfloat16, straight_through
from slimfx.methods.quantized import Parts, Quantized, as_float, spread

Stored = Quantized | Tensor


def learned_adapter(parts: Parts, *, store: Callable[[Tensor], Stored]) -> Learnable:
    """L, R, and the scales of the codes where there are codes, from where `parts` has them.

    `store`: an adapter matrix as it is kept. L and R are learned in units of their own root mean
    square, so that one rate serves both.
    """
    weight = parts.weight
    start: dict[str, Tensor] = {}
    units: dict[str, Tensor] = {}
    for name, matrix in (("L", parts.L), ("R", parts.R)):
        if matrix is not None:
            units[name] = as_float(matrix).square().mean().sqrt().clamp_min(1e-30)
            start[name] = as_float(matrix) / units[name]
    if isinstance(weight, Quantized):
        start["s"] = torch.zeros_like(weight.scale, dtype=torch.float32)

    def compressed(values: Values) -> Tensor:
        if not isinstance(weight, Quantized):
            return weight.float()
        scale = in_bfloat16(weight.scale.float() * values["s"].exp())
        return weight.codes.float() * spread(scale, weight.group, weight.codes.shape[1])

    def adapter(values: Values, name: str) -> Tensor:
        matrix = values[name] * units[name]
        return straight_through(matrix, as_float(store(matrix.detach())))

    def dense(values: Values) -> Tensor:
        if "L" not in units:
            return compressed(values)
        return compressed(values) + adapter(values, "R") @ adapter(values, "L")

    def finish(values: Values) -> tuple[Parts, Tensor | None]:
        kept = weight
        if isinstance(weight, Quantized):
            scale = (weight.scale.float() * values["s"].exp()).to(torch.bfloat16)
            kept = Quantized(weight.codes, scale, weight.group)
        if "L" not in units:
            return Parts(kept, None, None), None
        L, R = (store(values[name] * units[name]) for name in ("L", "R"))
        return Parts(kept, L, R), None

    return Learnable(start, dense, finish)
