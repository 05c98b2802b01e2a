"""Trainable adapters: the same answers, the gradients of the dense emulation, nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import (
    RECIPES,
    bits,
    captured,
    case,
    compressed,
    count,
    normal,
    same_tensors,
    stored_weight,
)
from slimfx.passes.train_adapters import Trained, put_back, train_adapters
from slimfx.runtime.straight_through import trainable
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import SlimError
from slimfx.recipe import Recipe

SLIM = torch.ops.slimfx
STORED = (SLIM.linear_int.default, SLIM.linear_24.default, SLIM.linear_bitmask.default)
WITH = [name for name, recipe in RECIPES.items() if recipe.adapter is not None]
MODELS = [
    *(("llama", recipe) for recipe in WITH),
    *(("bert", "slim-q"), ("gpt2", "50%"), ("albert", "slim"), ("tied", "1:4")),
]


@pytest.mark.parametrize(("kind", "recipe"), MODELS)
def test_the_trainable_program_answers_as_the_stored_one(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    made, trained = train_adapters(program)
    inputs = case(kind).inputs
    with torch.no_grad():
        wanted, found = program.module()(**inputs), made.module()(**inputs)
    assert torch.equal(wanted, found)
    learned = {name for name, value in made.named_parameters() if value.requires_grad}
    assert learned == {each.parameter for each in trained}
    assert {value.dtype for name, value in made.named_parameters() if name in learned} == {
        torch.float32
    }


@pytest.mark.parametrize("recipe", WITH)
def test_every_adapter_is_two_float_products_and_the_weights_stay(recipe: str) -> None:
    program = compressed("llama", recipe)
    made, trained = train_adapters(program)
    layers = 14  # seven in each of two blocks
    assert len(trained) == 2 * layers
    assert count(made, *STORED) == layers
    how = RECIPES[recipe].adapter
    assert how is not None
    assert count(made, SLIM.fake_quantize.default) == (0 if how.bits == 32 else 2 * layers)
    kept = {name: t for name, t in made.state_dict.items() if "_trained" not in name}
    assert all(program.state_dict[name].data_ptr() == t.data_ptr() for name, t in kept.items())
    parts = {name for each in trained for name in each.parts}
    masks = {name for each in trained for name in each.parts if name.endswith(("L_indices",))}
    assert program.state_dict.keys() - made.state_dict.keys() == parts
    assert bool(masks) == how.sparse


@pytest.mark.parametrize("recipe", WITH)
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_put_back_unchanged_gives_the_very_program(kind: str, recipe: str) -> None:
    program = compressed(kind, recipe)
    made, trained = train_adapters(program)
    again = put_back(program, trained, made.state_dict)
    assert same_tensors(again.state_dict, program.state_dict)
    assert str(again.graph) == str(program.graph)


@pytest.mark.parametrize("recipe", WITH)
def test_put_back_changes_what_was_trained_and_nothing_else(recipe: str) -> None:
    program = compressed("llama", recipe)
    before = {name: bits(t) for name, t in program.state_dict.items()}
    made, trained = train_adapters(program)
    values = {name: v + torch.randn_like(v) * v.std() for name, v in start(made, trained).items()}
    again = put_back(program, trained, values)
    changed = {name for name, t in again.state_dict.items() if bits(t) != before[name]}
    parts = {name for each in trained for name in each.parts}
    assert changed == {name for name in parts if not name.endswith("indices")}
    assert {name: bits(t) for name, t in program.state_dict.items()} == before
    with torch.no_grad():
        for each in trained:
            made.state_dict[each.parameter].copy_(values[each.parameter])
        inputs = case("llama").inputs
        assert torch.equal(made.module()(**inputs), again.module()(**inputs))


def start(made: ExportedProgram, trained: tuple[Trained, ...]) -> dict[str, Tensor]:
    """The parameters as they are before training."""
    return {each.parameter: made.state_dict[each.parameter].detach() for each in trained}


def in_float64(program: ExportedProgram) -> nn.Module:
    """The module with its own parameters in float64; what is stored stays as it is."""
    module = program.module()
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                wide = nn.Parameter(value.detach().double(), requires_grad=value.requires_grad)
                part._parameters[name] = wide
    return module


def two_layers(recipe: Recipe) -> tuple[ExportedProgram, nn.Module]:
    """A program in float64 of two linears, a GELU between, and its eager model."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).double()
    program = slimfx.capture(model, (normal(5, 6, 16).double(),))
    return slimfx.compress(program, recipe, [normal(1, 40, 16).double()]), model


@pytest.mark.parametrize("recipe", WITH)
def test_gradients_are_those_of_the_dense_emulation_in_float64(recipe: str) -> None:
    how = RECIPES[recipe]
    program, model = two_layers(how)
    made, trained = train_adapters(program)
    module, x = in_float64(made), normal(3, 5, 16).double().requires_grad_()
    sent = normal(4, 5, 8).double()
    module(x).backward(sent)
    found = dict(module.named_parameters())

    factors: dict[str, Tensor] = {}
    h = x.detach().clone().requires_grad_()
    y: Any = h
    for name, layer in (("0", model[0]), ("2", model[2])):
        K = layer.in_features
        c = program.state_dict.get(f"{name}.slim_input_scale", torch.ones(1)).double()
        own = {each.parameter: each for each in trained if each.parameter.startswith(f"{name}.")}
        L, R = (
            trainable(own[f"{name}.slim_{which}_trained"].stored, width).double().requires_grad_()
            for which, width in (("L", K), ("R", _rank(own, name, K)))
        )
        whole = stored_weight(program, name, (layer.out_features, K), how)
        assert whole is not None
        W = whole.double() / c - (R @ L).detach()
        bias = program.state_dict[f"{name}.bias"].detach().double()
        z = y * c
        y = z @ W.T + bias + (z @ L.T) @ R.T
        y = torch.nn.functional.gelu(y) if name == "0" else y
        factors |= {f"{name}.slim_L_trained": L, f"{name}.slim_R_trained": R}
    y.backward(sent)
    close = {"rtol": 1e-6, "atol": 1e-6}  # the emulated weight is float32
    torch.testing.assert_close(x.grad, h.grad, **close)
    for name, value in factors.items():
        assert value.grad is not None
        mask = made.state_dict.get(f"{name}_mask", torch.ones(1, dtype=torch.bool))
        torch.testing.assert_close(found[name].grad, value.grad * mask, **close)


def _rank(own: dict[str, Any], name: str, K: int) -> int:
    L = own[f"{name}.slim_L_trained"].stored
    return trainable(L, K).shape[0]


def test_a_program_without_adapters_is_refused() -> None:
    for program in (captured("llama"), compressed("llama", "wanda")):
        with pytest.raises(SlimError, match="no adapters to train; compress it with a recipe"):
            train_adapters(program)
