"""Promise 10: weights and inputs of any kind give a finite program or an error with a name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import normal
from torch import Tensor, nn

import slimfx
from slimfx.errors import SlimError
from slimfx.methods import COMPENSATORS
from slimfx.methods.stats import Stats

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda w: 0 * w,
    "constant": lambda w: 0 * w + 0.5,
    "inf": lambda w: w.index_fill(0, torch.tensor([1]), torch.inf),
    "nan": lambda w: w.index_fill(0, torch.tensor([1]), torch.nan),
    "huge": lambda w: 1e30 * w,
    "tiny": lambda w: 1e-30 * w,
    "denormal": lambda w: 1e-41 * w,
    "one outlier": lambda w: w.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1e6)),
}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda x: 0 * x,
    "one-hot": lambda x: torch.eye(16)[torch.arange(len(x)) % 16],
    "one token": lambda x: x[:1],
    "mostly padding": lambda x: x * (torch.arange(len(x)) % 10 == 0)[:, None],
    "huge": lambda x: 1e30 * x,
    "tiny": lambda x: 1e-30 * x,
}


def outcome(recipe: str, weight: Tensor, x: Tensor) -> str:
    """What became of a layer: "finite", or the error."""
    layer = nn.Linear(16, 12)
    layer.weight.data = weight
    program = slimfx.capture(nn.Sequential(layer).eval(), (normal(3, 5, 16),))
    try:
        small = slimfx.compress(program, recipe, [x])
    except SlimError as error:
        assert str(error).startswith("0: ")  # the layer's name
        return f"refused: {error}"
    stored = [t.float() for t in small.state_dict.values() if t.is_floating_point()]
    assert all(t.isfinite().all() for t in stored)
    return "finite"


@pytest.mark.parametrize("recipe", ["slim", "slim-q", "joint-q", "sparsegpt"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_finite_for_any_weight(name: str, recipe: str) -> None:
    found = outcome(recipe, WEIGHTS[name](normal(1, 12, 16)), normal(2, 64, 16))
    refused = "refused: 0: 16 of 192 weights are NaN or infinite"
    assert found.startswith(refused if name in ("inf", "nan") else "finite")


@pytest.mark.parametrize("recipe", ["slim", "slim-q", "joint-q", "sparsegpt"])
@pytest.mark.parametrize("name", INPUTS)
def test_finite_for_any_input(name: str, recipe: str) -> None:
    outcome(recipe, normal(1, 12, 16), INPUTS[name](normal(2, 64, 16)))


def test_a_solution_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone_wrong(error: Tensor, stats: Stats, *, rank: int, fast: bool) -> tuple[Tensor, Tensor]:
        return torch.full((rank, 16), torch.nan), torch.ones(12, rank)

    monkeypatch.setitem(COMPENSATORS, "slim-lora", gone_wrong)
    found = outcome("slim", normal(1, 12, 16), normal(2, 64, 16))
    assert found.startswith("refused: 0: the solution is not finite")
