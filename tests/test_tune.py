"""Tuning by block: never worse than its start, the same each time, and nothing but what it may
change.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from models import answer, captured, case
from slimfx.passes.cut_blocks import cut_blocks
from slimfx.passes.find_linears import find_linears
from torch import Tensor, nn

import slimfx
from slimfx import calibrate
from slimfx.errors import CalibrationError, RecipeError
from slimfx.methods.learnable import Learnable
from slimfx.methods.quantized import Parts
from slimfx.recipe import Recipe
from slimfx.steps import Adapter, Prune, Quantize, Solve, Tune
from slimfx.tune import tune

GROUPED = Quantize("absmax", granularity="group", group=8)
RECIPES = {
    "match": Recipe(Prune(), adapter=Adapter(rank=0.3), tune=Tune("match")),
    "match int4": Recipe(Prune(), adapter=Adapter(rank=0.3, bits=4), tune=Tune("match")),
    "match bf16": Recipe(Prune(), None, adapter=Adapter(rank=0.3), tune=Tune("match")),
    "clipping": Recipe(None, GROUPED, None, tune=Tune("clipping", epochs=8, rate=0.1)),
    "affine": Recipe(Prune(), GROUPED, None, tune=Tune("affine", epochs=8, rate=0.03)),
}


def error(kind: str, recipe: Recipe) -> float:
    """Mean squared error of the whole program on its calibration inputs."""
    small = slimfx.compress(captured(kind), recipe, case(kind).batches)
    found = 0.0
    for batch in case(kind).batches:
        inputs = batch if isinstance(batch, dict) else dict(zip(case(kind).inputs, [batch]))
        wanted = answer(captured(kind).module(), inputs)
        found += (answer(small.module(), inputs) - wanted).square().mean().item()
    return found


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["mlp", "llama", "gpt2"])
def test_tuning_brings_the_program_closer_to_the_dense_one(kind: str, name: str) -> None:
    tuned = RECIPES[name]
    solved = dataclasses.replace(tuned, tune=None)
    assert error(kind, tuned) < 1.05 * error(kind, solved)  # each block is closer, not each sum


def test_matching_a_pruned_block_pays() -> None:
    tuned = dataclasses.replace(RECIPES["match"], tune=Tune("match", epochs=20))
    assert error("llama", tuned) < 0.9 * error("llama", dataclasses.replace(tuned, tune=None))


@pytest.mark.parametrize("name", ["match int4", "affine"])
def test_the_same_recipe_gives_the_same_bytes(name: str) -> None:
    first, second = (
        slimfx.compress(captured("llama"), RECIPES[name], case("llama").batches).state_dict
        for _ in range(2)
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_codes_and_indices_stay_as_they_were_solved() -> None:
    tuned = slimfx.compress(captured("mlp"), RECIPES["match int4"], case("mlp").batches)
    solved = slimfx.compress(
        captured("mlp"),
        dataclasses.replace(RECIPES["match int4"], tune=None),
        case("mlp").batches,
    )
    same = {k: torch.equal(v, tuned.state_dict[k]) for k, v in solved.state_dict.items()}
    assert all(ok for key, ok in same.items() if key.endswith(("_values", "_indices")))
    assert not all(same.values())


@pytest.mark.parametrize("kind", ["bert", "albert", "transposed storage", "vit"])
def test_encoders_shared_layers_and_stored_transposes_are_tuned(kind: str) -> None:
    tuned = slimfx.compress(captured(kind), RECIPES["match"], case(kind).batches)
    assert all(torch.isfinite(v.float()).all() for v in tuned.state_dict.values())


def test_a_bfloat16_program_is_tuned() -> None:
    program = slimfx.capture(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).bfloat16(), X)
    tuned = slimfx.compress(program, RECIPES["match"], [X[0]])
    assert tuned.module()(X[0]).dtype == torch.bfloat16


X = (torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).bfloat16(),)


class Overwriting(nn.Module):
    """Writes to memory that the backward pass of its linears and of the sigmoid needs."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.a(x))
        z = self.b(y)
        return y.add_(z) if self.in_place else y + z


def test_operations_in_place_do_not_disturb_the_gradients() -> None:
    models = [Overwriting(in_place=in_place) for in_place in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (
        slimfx.compress(slimfx.capture(m, (X[0].float(),)), RECIPES["match"], [X[0].float()])
        for m in models
    )
    assert all(torch.equal(v, second.state_dict[k]) for k, v in first.state_dict.items())


class Choosing(nn.Module):
    """Answers with an index alone, with it as a number, or with something else beside it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        index = self.a(x).argmax(-1)
        return {"index": index, "number": index.float(), "beside": (x * 2, index)}[self.kind]


@pytest.mark.parametrize("kind", ["index", "number", "beside"])
def test_a_block_without_a_gradient_stays_as_it_was_solved(kind: str) -> None:
    x = X[0].float()
    program = slimfx.capture(Choosing(kind), (x,))
    tuned, solved = (
        slimfx.compress(program, dataclasses.replace(RECIPES["match"], tune=how), [x]).state_dict
        for how in (Tune("match"), None)
    )
    assert all(torch.equal(value, solved[key]) for key, value in tuned.items())


@cache
def one_layer() -> tuple[calibrate.Walk, list, Tensor]:  # type: ignore[type-arg]
    """A linear layer without bias before its only block."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    layer.weight = nn.Parameter(torch.randn(4, 8, generator=draw))
    x = torch.randn(32, 8, generator=draw)
    program = slimfx.capture(layer, (x,))
    blocks = cut_blocks(program, find_linears(program))
    return calibrate.start(program, [x]), blocks, layer.weight.detach()


def free(start: Tensor) -> Learnable:
    """A weight of which everything is learned."""
    return Learnable({"W": start}, lambda v: v["W"], lambda v: (Parts(v["W"], None, None), None))


def tuned(start: Tensor, *, epochs: int = 200, rate: float = 0.1) -> Tensor:
    walk, blocks, _ = one_layer()
    with torch.no_grad():  # as `compress` may be called
        learned = tune(
            *(walk, blocks[0], {"weight": free(start)}, lambda fqn, dense: dense),
            fixed={},
            epochs=epochs,
            rate=rate,
            seed=0,
        )
    return learned["weight"]["W"]


def test_what_can_be_learned_whole_is_learned_whole() -> None:
    _, _, W = one_layer()
    torch.testing.assert_close(tuned(torch.zeros(4, 8)), W, rtol=0, atol=1e-2)


def test_the_start_is_kept_where_descent_makes_it_worse() -> None:
    _, _, W = one_layer()
    start = W + 1e-4
    assert torch.equal(tuned(start, epochs=1, rate=10.0), start)


def test_a_loss_that_is_not_finite_names_the_rate() -> None:
    with pytest.raises(CalibrationError, match=r"tune\.rate"):
        tuned(torch.full((4, 8), torch.nan))


def test_the_given_program_gets_no_gradients() -> None:
    walk, _, _ = one_layer()
    tuned(torch.zeros(4, 8), epochs=1)
    assert all(p.grad is None for p in walk.program.parameters())


@pytest.mark.parametrize("method", ["clipping", "affine"])
@pytest.mark.parametrize(
    "other",
    [
        {"adapter": Adapter()},
        {"quantize": Quantize()},
        {"solve": Solve("second-order")},
    ],
)
def test_learned_scales_go_with_absmax_alone(method: str, other: dict) -> None:  # type: ignore[type-arg]
    plain = {"prune": None, "quantize": GROUPED, "adapter": None, "tune": Tune(method)}
    with pytest.raises(RecipeError, match="learns absmax scales alone"):
        Recipe(**{**plain, **other})
