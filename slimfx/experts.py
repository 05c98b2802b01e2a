"""Mixture of experts as torch.export can trace it: each expert multiplies the rows routed to it.

    y[rows_e] += weight_e * down_e(act(up_e(x[rows_e])))        rows_e = nonzero(choice == e)

How many rows an expert gets is known at run time alone, and may be none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from slimfx.errors import need

_NAME = "slimfx_routed"


def routed(self: Any, x: Tensor, choice: Tensor, share: Tensor) -> Tensor:
    """What transformers' stacks of experts answer, by one linear for each expert and projection.

    Args:
        self: the module that holds the stacks, as transformers' experts interface describes it.
        x: [tokens, hidden].
        choice: the experts of each token, [tokens, k].
        share: their weights, [tokens, k].
    """
    up = "gate_up_proj" if self.has_gate else "up_proj"
    y = torch.zeros_like(x)
    for expert in range(getattr(self, up).shape[0]):
        rows, place = (choice == expert).nonzero(as_tuple=True)
        hidden = _project(self, up, expert, x[rows])
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        hidden = _project(self, "down_proj", expert, hidden)
        if self.has_post_expert_norm:
            hidden = self.post_expert_norm(hidden)
        y = y.index_add(0, rows, (hidden * share[rows, place, None]).to(y.dtype))
    return y


def _project(stacks: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(stacks, name)[expert]
    bias = getattr(stacks, f"{name}_bias")[expert] if stacks.has_bias else None
    if not stacks.is_transposed:
        return linear(x, weight, bias)
    y = x @ weight
    return y if bias is None else y + bias


@contextmanager
def routed_experts(model: nn.Module) -> Iterator[None]:
    """For the time of the block, stacks of experts of a transformers model are `routed`."""
    own = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if own is None or not any(hasattr(module, "_apply_gate") for module in model.modules()):
        yield
        return
    need("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS.register(_NAME, routed)
    model.set_experts_implementation(_NAME)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_experts_implementation(own)  # type: ignore[operator]
