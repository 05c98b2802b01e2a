"""What every contender of a bench must show before it is timed: that its product is right."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfx.errors import SlimError

_OUTPUTS = 256


def sample(N: int, most: int = _OUTPUTS) -> Tensor:
    """Which of N outputs or rows are checked: up to `most`, the first and the last among them."""
    return torch.linspace(0, N - 1, min(N, most), dtype=torch.float64).round().long()


def product_error(what: str, found: Tensor, exact: Tensor, limit: float) -> float:
    """max |found - exact| in standard deviations of the exact product.

    Raises:
        SlimError: it is above the limit.
    """
    deviation = exact.std().clamp_min(torch.finfo(torch.float64).tiny)
    error = ((found.double() - exact).abs().max() / deviation).item()
    if not error <= limit:
        raise SlimError(
            f"{what}: its product is {error:.2g} standard deviations off, more than {limit:g}; no "
            f"time is worth reporting"
        )
    return error
