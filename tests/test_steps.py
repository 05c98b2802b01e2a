"""What the steps of a layer say of it: pattern, statistics it needs, and what goes together."""

from __future__ import annotations

import pytest

from slimfx.errors import RecipeError
from slimfx.methods import COMPENSATORS, PRUNERS
from slimfx.methods.masks import NofM, Unstructured
from slimfx.recipe import PRESETS, Recipe
from slimfx.steps import Adapter, Inputs, LayerRecipe, Prune, Quantize, Solve, Transform, Tune

SPARSEGPT = Prune("sparsegpt")
FULL = Adapter("full")


def layer(**steps: object) -> LayerRecipe:
    """The SLiM recipe with other steps."""
    return LayerRecipe(**{"prune": Prune(), "quantize": Quantize(), "adapter": Adapter(), **steps})


def test_the_pattern_is_n_of_m_or_else_a_share() -> None:
    assert layer().pattern == NofM(2, 4)
    assert layer(prune=Prune(n=1, m=8)).pattern == NofM(1, 8)
    assert layer(prune=Prune(sparsity=0.3)).pattern == Unstructured(0.3, "row")
    assert layer(prune=Prune(sparsity=0.3, scope="layer")).pattern == Unstructured(0.3, "layer")
    assert layer(prune=None).pattern is None


NEED_COVARIANCE = {
    "sparsegpt": {"prune": SPARSEGPT, "solve": Solve("second-order")},
    "optq": {"prune": None, "solve": Solve("second-order")},
    "joint": {"prune": SPARSEGPT, "adapter": FULL, "solve": Solve("joint")},
    "jsq": {"prune": Prune("jsq")},
    "awq": {"transform": Transform("awq")},
    "full": {"adapter": FULL},
    "lplr": {"adapter": Adapter("lplr")},
    "caldera": {"prune": None, "solve": Solve("alternate", weight="second-order")},
}
NEED_NONE = {
    "slim": {},
    "magnitude": {"prune": Prune("magnitude"), "adapter": None},
    "smoothquant": {"transform": Transform("smoothquant"), "inputs": Inputs()},
    "slim-quant-o": {"transform": Transform("slim-quant-o")},
    "qera": {"adapter": Adapter("qera")},
    "alternate": {"solve": Solve("alternate")},
    "a weight that only alternation asks for": {"solve": Solve(weight="second-order")},
}


@pytest.mark.parametrize("name", NEED_COVARIANCE)
def test_the_covariance_is_taken_where_a_step_reads_it(name: str) -> None:
    assert layer(**NEED_COVARIANCE[name]).needs_covariance


@pytest.mark.parametrize("name", NEED_NONE)
def test_the_covariance_is_not_taken_where_its_diagonal_is_enough(name: str) -> None:
    assert not layer(**NEED_NONE[name]).needs_covariance


ABSMAX = {"quantize": Quantize("absmax"), "adapter": None}


def test_a_transform_and_a_tuned_one_scale_the_inputs_and_nothing_else() -> None:
    assert not layer(inputs=Inputs(), tune=Tune("match")).scales_inputs
    assert not layer(tune=Tune("clipping"), **ABSMAX).scales_inputs
    assert layer(tune=Tune("affine"), **ABSMAX).scales_inputs
    for method in ("awq", "smoothquant", "slim-quant-o"):
        assert layer(transform=Transform(method)).scales_inputs


TOGETHER = [(prune, solve) for prune in PRUNERS for solve in ("one-shot", "alternate")]
TOGETHER += [("sparsegpt", "second-order"), ("sparsegpt", "joint")]


@pytest.mark.parametrize("prune", [*PRUNERS, "sparsegpt"])
@pytest.mark.parametrize("method", ["one-shot", "second-order", "joint", "alternate"])
def test_sparsegpt_goes_with_the_solvers_that_pass_errors_on_and_no_score_does(
    prune: str, method: str
) -> None:
    steps = {"prune": Prune(prune), "adapter": FULL, "solve": Solve(method)}
    if (prune, method) in TOGETHER:
        layer(**steps)
        return
    with pytest.raises(RecipeError, match=rf"^prune\.method: {prune} .* {method};"):
        layer(**steps)


@pytest.mark.parametrize("adapter", [*COMPENSATORS, "lplr"])
def test_the_joint_solver_takes_an_adapter_that_weighs_with_the_covariance(adapter: str) -> None:
    steps = {"prune": SPARSEGPT, "adapter": Adapter(adapter), "solve": Solve("joint")}
    if adapter in ("full", "lplr"):
        assert Adapter(adapter).full
        layer(**steps)
        return
    with pytest.raises(RecipeError, match=rf"^adapter\.method: {adapter} "):
        layer(**steps)


def test_alternation_needs_an_adapter_and_awq_something_to_quantize() -> None:
    with pytest.raises(RecipeError, match=r"^adapter: null does not go with solve\.method alter"):
        layer(adapter=None, solve=Solve("alternate"))
    with pytest.raises(RecipeError, match=r"^quantize: null does not go with transform awq"):
        layer(quantize=None, transform=Transform("awq"))
    for method in ("smoothquant", "slim-quant-o"):
        layer(quantize=None, transform=Transform(method))


@pytest.mark.parametrize("method", ["clipping", "affine"])
@pytest.mark.parametrize(
    "change",
    [
        {"quantize": Quantize()},
        {"quantize": None},
        {"adapter": Adapter()},
        {"prune": None, "solve": Solve("second-order")},
    ],
)
def test_scales_are_learned_of_absmax_codes_alone(method: str, change: dict) -> None:
    layer(tune=Tune(method), **ABSMAX)
    layer(tune=Tune("match"), **{**ABSMAX, **change})
    with pytest.raises(RecipeError, match=rf"^tune\.method: {method} learns absmax scales alone"):
        layer(tune=Tune(method), **{**ABSMAX, **change})


def test_a_layer_of_which_nothing_changes_is_to_be_skipped() -> None:
    with pytest.raises(RecipeError, match=r"quantize: null and prune: null .* add it to skip"):
        layer(prune=None, quantize=None)
    layer(prune=None, adapter=None)
    layer(quantize=None, adapter=None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_one_that_a_layer_can_have(name: str) -> None:
    how = Recipe.preset(name).for_layer("layers.0.up")
    assert how is not None
    assert Recipe.preset(name).for_layer("lm_head") is None
    assert how.needs_covariance == (name not in WITHOUT_COVARIANCE)


WITHOUT_COVARIANCE = {
    *("magnitude", "wanda", "absmax", "smoothquant", "omniquant", "affinequant"),
    *("naive-lora", "l2qer", "qera", "slim", "slim-o", "slim-q", "losparse", "lq-lora", "oats"),
}
