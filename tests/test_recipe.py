"""Recipes as data: what goes in comes out, and what cannot be is refused by its key."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfx.errors import RecipeError
from slimfx.recipe import PRESETS, Calibration, Recipe, matches
from slimfx.steps import (
    Adapter,
    Inputs,
    LayerRecipe,
    Override,
    Prune,
    Quantize,
    Solve,
    Target,
    Transform,
    Tune,
)

OVERRIDDEN = """
preset: slim-q
prune: {n: 1}
skip: [lm_head, "*.gate"]
overrides:
- match: "layers.*.up"
  prune: null
  adapter: {rank: 16, bits: 32}
- match: down
  quantize: {method: absmax, granularity: group, group: 32}
  adapter: null
"""


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any recipe: numbers over their whole range, patterns of any text."""
    counts = st.integers(1, 2**31)
    shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
    m = draw(st.integers(2, 64))
    prune = Prune(
        draw(st.sampled_from(["magnitude", "wanda", "jsq"])),
        draw(st.integers(1, m - 1)),
        m,
        draw(st.none() | shares),
        draw(st.sampled_from(["row", "layer"])),
    )
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    methods = ["absmax", "slim-quant"] if granularity == "tensor" else ["absmax"]
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    quantize = Quantize(draw(st.sampled_from(methods)), bits, granularity, draw(counts))
    sparse = draw(st.booleans())
    adapter = Adapter(
        draw(st.sampled_from(["naive", "l2qer", "qera", "slim-lora", "full"])),
        draw(shares | st.integers(1, 4096).map(float)),
        draw(st.sampled_from([4, 16] if sparse else [4, 16, 32])),
        draw(counts),
        sparse,
    )
    solve = Solve(
        draw(st.sampled_from(["one-shot", "alternate"])),
        draw(counts),
        low_rank_first=draw(st.booleans()),
        correct_bias=draw(st.booleans()),
    )
    transform = Transform(
        draw(st.sampled_from(["smoothquant", "slim-quant-o"])),
        draw(st.floats(0, 1)),
        draw(shares),
        draw(st.floats(1, 1e30)),
    )
    tune = Tune("match", draw(counts), draw(shares))
    patterns = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    rank = st.sampled_from([{}, {"rank": 3}, {"rank": 0.25, "bits": 4}])
    override = st.builds(
        Override,
        match=patterns,
        adapter=rank,
        transform=st.sampled_from([{}, None, {"method": "smoothquant"}]),
        inputs=st.sampled_from([{}, None, {"format": "fp8"}]),
    )
    return Recipe(
        *draw(st.sampled_from([(prune, quantize), (None, quantize), (prune, None)])),
        adapter=draw(st.sampled_from([adapter, *[None] * (solve.method == "one-shot")])),
        solve=solve,
        transform=draw(st.sampled_from([transform, None])),
        inputs=draw(st.sampled_from([Inputs(), None])),
        tune=draw(st.sampled_from([tune, None])),
        calibration=Calibration(draw(counts), draw(counts), draw(counts), draw(counts)),
        skip=tuple(draw(st.lists(patterns, max_size=3))),
        overrides=tuple(draw(st.lists(override, max_size=2))),
        budget=draw(st.sampled_from([None, Target(bits=3.5), Target(loss=0.02)])),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(recipes())
def test_yaml_and_back_gives_an_equal_recipe(recipe: Recipe) -> None:
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.digest() == recipe.digest()


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_and_back_gives_the_same_preset(name: str) -> None:
    recipe = Recipe.preset(name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(f"preset: {name}") == recipe


def test_yaml_and_back_keeps_overrides_and_their_nulls() -> None:
    recipe = Recipe.from_yaml(OVERRIDDEN)
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe
    assert again.overrides[0].prune is None
    assert again.overrides[1].quantize == {
        "method": "absmax",
        "granularity": "group",
        "group": 32,
    }


def test_the_canonical_form_names_every_field() -> None:
    data = Recipe().to_dict()
    assert set(data) == {field.name for field in dataclasses.fields(Recipe)}
    for part in (Prune, Quantize, Adapter, Solve, Calibration):
        fields = {field.name for field in dataclasses.fields(part)}
        assert set(data[part.__name__.lower()]) == fields
    assert [data[key] for key in ("transform", "inputs", "tune")] == [None] * 3
    data = Recipe(transform=Transform(), inputs=Inputs(), tune=Tune()).to_dict()
    for part in (Transform, Inputs, Tune):
        fields = {field.name for field in dataclasses.fields(part)}
        assert set(data[part.__name__.lower()]) == fields
    assert json.loads(json.dumps(data)) == data


def test_an_empty_recipe_is_the_slim_preset() -> None:
    assert Recipe.from_yaml("") == Recipe.from_dict({}) == Recipe.preset("slim")


def test_a_preset_keeps_its_keys_where_the_recipe_says_nothing() -> None:
    recipe = Recipe.from_yaml("preset: slim-q\nadapter: {rank: 0.2}\ncalibration: {samples: 3}")
    assert recipe.adapter == Adapter(rank=0.2, bits=4)
    assert recipe.calibration == Calibration(samples=3)
    assert recipe.prune == Prune()


def test_a_step_that_a_preset_leaves_out_can_be_added_and_taken_away() -> None:
    assert Recipe.from_yaml("preset: wanda\nadapter: {bits: 4}").adapter == Adapter(bits=4)
    assert Recipe.from_yaml("preset: slim\nadapter: null\nprune: null") == Recipe(
        prune=None, adapter=None
    )


def test_building_from_a_mapping_changes_neither_it_nor_the_presets() -> None:
    data = {"preset": "slim", "prune": {"n": 1}, "overrides": [{"match": "x", "prune": {"n": 3}}]}
    copy, before = json.loads(json.dumps(data)), {n: r.to_dict() for n, r in PRESETS.items()}
    Recipe.from_dict(data)
    assert data == copy
    assert {n: r.to_dict() for n, r in PRESETS.items()} == before


@pytest.mark.parametrize(
    ("text", "key", "meant", "allowed"),
    [
        ("quantise: {bits: 4}", "quantise", "quantize", "calibration"),
        ("prune: {methd: wanda}", "prune.methd", "method", "m, method, n"),
        ("adapter: {ranks: 8}", "adapter.ranks", "rank", "bits, fast, group, method, rank, sparse"),
        ("adapter: {spares: true}", "adapter.spares", "sparse", "method"),
        ("prune: {sparsty: 0.5}", "prune.sparsty", "sparsity", "path, scope, sparsity"),
        ("solve: {metod: joint}", "solve.metod", "method", "correct_bias, low_rank_first"),
        ("transform: {alfa: 0.5}", "transform.alfa", "alpha", "alpha, factor, method, share"),
        ("inputs: {formt: fp8}", "inputs.formt", "format", "format"),
        ("tune: {epoch: 3}", "tune.epoch", "epochs", "epochs, method, rate"),
        ("input: {format: fp8}", "input", "inputs", "inputs, overrides"),
        ("calibration: {sample: 8}", "calibration.sample", "samples", "batch, length"),
        ("overrides: [{macth: x}]", "overrides[0].macth", "match", "inputs, match, prune"),
        (
            "overrides: [{match: x, transform: {alfa: 1}}]",
            "overrides[x].transform.alfa",
            "alpha",
            "alpha, factor, method, share",
        ),
        (
            "overrides: [{match: x, quantize: {groups: 8}}]",
            "overrides[x].quantize.groups",
            "group",
            "bits, granularity, group, method",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_near_miss_and_all_that_is_allowed(
    text: str, key: str, meant: str, allowed: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert f"did you mean {meant}?" in message
    assert allowed in message.partition("allowed: ")[2]


def test_an_unknown_key_like_no_other_gets_no_guess() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml("xyzzy: 1")
    assert str(caught.value).startswith("xyzzy: no such key (allowed: adapter, ")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("quantize: {bits: '4'}", "quantize.bits"),
        ("quantize: {bits: 4.0}", "quantize.bits"),
        ("quantize: {bits: true}", "quantize.bits"),
        ("prune: {scope: 2}", "prune.scope"),
        ("prune: {sparsity: half}", "prune.sparsity"),
        ("prune: {sparsity: true}", "prune.sparsity"),
        ("prune: {method: mask-file, path: 3}", "prune.path"),
        ("adapter: {sparse: 1}", "adapter.sparse"),
        ("adapter: {sparse: 'yes'}", "adapter.sparse"),
        ("adapter: {fast: null}", "adapter.fast"),
        ("solve: {low_rank_first: 0}", "solve.low_rank_first"),
        ("solve: {correct_bias: 1.0}", "solve.correct_bias"),
        ("solve: {rounds: true}", "solve.rounds"),
        ("solve: null", "solve"),
        ("transform: awq", "transform"),
        ("transform: {alpha: '0.5'}", "transform.alpha"),
        ("inputs: fp8", "inputs"),
        ("inputs: {format: true}", "inputs.format"),
        ("tune: {epochs: 1.5}", "tune.epochs"),
        ("tune: {rate: x}", "tune.rate"),
        ("budget: {bits: few}", "budget.bits"),
        ("budget: 3.5", "budget"),
        ("quantize: slim-quant", "quantize"),
        ("prune: [2, 4]", "prune"),
        ("prune: {n: null}", "prune.n"),
        ("prune: {n: true}", "prune.n"),
        ("calibration: {seed: false}", "calibration.seed"),
        ("prune: {method: 3}", "prune.method"),
        ("adapter: {rank: '0.1'}", "adapter.rank"),
        ("adapter: {rank: true}", "adapter.rank"),
        ("calibration: {samples: 1e3}", "calibration.samples"),  # YAML 1.1 reads a string
        ("calibration: null", "calibration"),
        ("skip: lm_head", "skip"),
        ("skip: [lm_head, 3]", "skip[1]"),
        ("skip: {lm_head: true}", "skip"),
        ("overrides: {match: x}", "overrides"),
        ("overrides: [x]", "overrides[0]"),
        ("overrides: [{match: 3}]", "overrides[0].match"),
        ("overrides: [{match: x, prune: 2}]", "overrides[x].prune"),
        ("overrides: [{match: x, solve: null}]", "overrides[x].solve"),
        ("overrides: [{match: x, transform: awq}]", "overrides[x].transform"),
        ("overrides: [{match: x, inputs: {format: 8}}]", "overrides[x].inputs.format"),
        ("overrides: [{match: x, adapter: {sparse: 1}}]", "overrides[x].adapter.sparse"),
        ("overrides: [{match: x}, {match: y, prune: {n: two}}]", "overrides[y].prune.n"),
        ("preset: 3", "preset"),
        ("preset: slimm", "preset"),
    ],
)
def test_a_wrong_type_or_name_is_refused_by_its_key(text: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert str(caught.value).startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("prune: {n: 4, m: 4}", "prune"),
        ("prune: {n: 5}", "prune"),
        ("prune: {n: 0}", "prune"),
        ("prune: {method: sparsegpt}", "prune.method"),
        ("quantize: {bits: 5}", "quantize.bits"),
        ("quantize: {method: rtn}", "quantize.method"),
        ("quantize: {granularity: group}", "quantize"),
        ("quantize: {method: slim-histogram, granularity: channel}", "quantize"),
        ("quantize: {granularity: row}", "quantize.granularity"),
        ("quantize: {group: 0}", "quantize.group"),
        ("adapter: {rank: 1.5}", "adapter.rank"),
        ("adapter: {rank: 0}", "adapter.rank"),
        ("adapter: {rank: -0.1}", "adapter.rank"),
        ("adapter: {rank: .nan}", "adapter.rank"),
        ("adapter: {rank: .inf}", "adapter.rank"),
        ("adapter: {bits: 8}", "adapter.bits"),
        ("adapter: {group: -1}", "adapter.group"),
        ("adapter: {method: lora}", "adapter.method"),
        ("calibration: {samples: 0}", "calibration.samples"),
        ("calibration: {length: 0}", "calibration.length"),
        ("calibration: {batch: -2}", "calibration.batch"),
        ("prune: {sparsity: 0}", "prune.sparsity"),
        ("prune: {sparsity: 1}", "prune.sparsity"),
        ("prune: {sparsity: -0.5}", "prune.sparsity"),
        ("prune: {sparsity: .nan}", "prune.sparsity"),
        ("prune: {scope: column}", "prune.scope"),
        ("prune: {method: mask-file}", "prune.path"),
        ("prune: {path: masks.npz}", "prune.path"),
        ("quantize: {bits: 1}", "quantize.bits"),
        ("quantize: {bits: 16}", "quantize.bits"),
        ("adapter: {sparse: true, bits: 32}", "adapter.sparse"),
        ("adapter: {sparse: true, method: lplr}", "adapter.sparse"),
        ("solve: {method: newton}", "solve.method"),
        ("solve: {weight: joint}", "solve.weight"),
        ("solve: {rounds: 0}", "solve.rounds"),
        ("transform: {method: gptq}", "transform.method"),
        ("transform: {alpha: 1.5}", "transform.alpha"),
        ("transform: {alpha: .nan}", "transform.alpha"),
        ("transform: {share: 0}", "transform.share"),
        ("transform: {share: 1.01}", "transform.share"),
        ("transform: {factor: 0.5}", "transform.factor"),
        ("transform: {factor: .inf}", "transform.factor"),
        ("inputs: {format: int8}", "inputs.format"),
        ("tune: {method: sgd}", "tune.method"),
        ("tune: {epochs: 0}", "tune.epochs"),
        ("tune: {rate: 0}", "tune.rate"),
        ("tune: {rate: .nan}", "tune.rate"),
        ("tune: {method: clipping}", "tune.method"),
        ("tune: {method: affine}\nadapter: null", "tune.method"),
        ("preset: omniquant\nquantize: null\nprune: {n: 2}", "tune.method"),
        ("preset: omniquant\nsolve: {method: second-order}", "tune.method"),
        ("preset: affinequant\noverrides: [{match: x, adapter: {rank: 3}}]", "tune.method"),
        ("prune: null\nquantize: null", "quantize"),
        ("preset: absmax\nquantize: null", "quantize"),
        ("overrides: [{match: x, prune: null, quantize: null}]", "quantize"),
        ("overrides: [{match: x, transform: {share: 2}}]", "transform.share"),
        ("overrides: [{match: x, inputs: {format: fp4}}]", "inputs.format"),
        ("quantize: null\ntransform: {method: awq}", "quantize"),
        ("solve: {method: second-order}", "prune.method"),
        ("solve: {method: alternate, weight: second-order}", "prune.method"),
        ("solve: {weight: second-order}\nprune: {method: sparsegpt}", "prune.method"),
        ("preset: joint\nadapter: {method: naive}", "adapter.method"),
        ("preset: oats\nadapter: null", "adapter"),
        ("overrides: [{match: x, prune: {n: 9}}]", "prune"),
        ("overrides: [{match: x, adapter: {rank: 1.5}}]", "adapter.rank"),
    ],
)
def test_an_impossible_setting_is_refused_by_its_key(text: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert str(caught.value).startswith(f"{key}: ")


def test_an_override_without_a_pattern_is_refused() -> None:
    with pytest.raises(RecipeError, match="match"):
        Recipe.from_yaml("overrides: [{prune: null}]")


@pytest.mark.parametrize("text", ["[]", "[1]", "false", "0", "3", "slim", "'just text'"])
def test_yaml_that_is_not_a_mapping_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="mapping"):
        Recipe.from_yaml(text)


@pytest.mark.parametrize("text", ["prune: {n: 1", "\t", "a: b: c", "skip: &x [*y]", "? [1]\n: 2"])
def test_broken_yaml_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.from_yaml(text)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object:slimfx.recipe.Recipe {}",
        "!!python/object/apply:pathlib.Path.touch [&p !!python/object/apply:pathlib.Path [{}]]",
        "!!python/object/new:slimfx.recipe.Prune []",
        "!!python/name:os.system",
        "!!python/tuple [lm_head]",
    ],
)
def test_object_tags_are_refused_and_do_nothing(tag: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.from_yaml(f"skip: {tag.replace('{}', str(made))}")
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.my_lm_head", "lm_head", False),
        ("model.lm_head.proj", "lm_head", False),
        ("layers.3.mlp.up", "mlp.up", True),
        ("layers.3.mlp.up", "*.up", True),
        ("layers.3.mlp.up", "layers.[0-3].*", True),
        ("layers.4.mlp.up", "layers.[0-3].*", False),
        ("layers.13.mlp.up", "layers.?.*", False),
        ("layers.3.mlp.up", "*", True),
        ("layers.3.mlp.up", "Up", False),
        ("layers.3.mlp.up", "", False),
        ("layersX3", "layers.3", False),
    ],
)
def test_a_pattern_matches_a_whole_name_or_its_end_after_a_dot(
    name: str, pattern: str, expected: bool
) -> None:
    assert matches(name, pattern) is expected


def test_a_skipped_layer_has_no_settings_even_if_an_override_names_it() -> None:
    recipe = Recipe(skip=("up",), overrides=(Override("*.up", prune={"n": 1}),))
    assert recipe.for_layer("layers.0.up") is None
    assert recipe.for_layer("layers.0.down") == LayerRecipe(Prune(), Quantize(), Adapter())


def test_the_later_of_two_overrides_wins_key_by_key() -> None:
    recipe = Recipe(
        overrides=(
            Override("layers.*", prune={"n": 1, "m": 8}, adapter={"bits": 4}),
            Override("up", prune={"n": 3}, adapter={"rank": 2}),
        )
    )
    up, down = recipe.for_layer("layers.0.up"), recipe.for_layer("layers.0.down")
    assert up == LayerRecipe(Prune(n=3, m=8), Quantize(), Adapter(rank=2, bits=4))
    assert down == LayerRecipe(Prune(n=1, m=8), Quantize(), Adapter(bits=4))


def test_an_override_may_build_on_an_earlier_one() -> None:
    recipe = Recipe(
        overrides=(
            Override("layers.*", quantize={"method": "absmax"}),
            Override("layers.*.up", quantize={"granularity": "group", "group": 32}),
        )
    )
    layer = recipe.for_layer("layers.0.up")
    assert layer is not None
    assert layer.quantize == Quantize("absmax", granularity="group", group=32)


def test_a_null_override_leaves_the_step_out_and_a_later_one_brings_it_back() -> None:
    recipe = Recipe(
        overrides=(
            Override("*", adapter=None, prune=None),
            Override("up", adapter={"method": "naive"}),
        )
    )
    assert recipe.for_layer("a.down") == LayerRecipe(None, Quantize(), None)
    up = recipe.for_layer("a.up")
    assert up is not None
    assert up.adapter == Adapter("naive")
    assert up.prune is None


def test_quantize_may_be_null_where_something_is_pruned() -> None:
    recipe = Recipe.from_yaml("quantize: null\nprune: {sparsity: 0.5, scope: layer}")
    assert recipe.quantize is None
    layer = recipe.for_layer("a.up")
    assert layer is not None
    assert (layer.quantize, layer.prune.sparsity) == (None, 0.5)
    one = Recipe(overrides=(Override("up", quantize=None),))
    assert one.for_layer("a.up").quantize is None
    assert one.for_layer("a.down").quantize == Quantize()
    assert Recipe.from_yaml(one.to_yaml()) == one


def test_an_override_adds_changes_and_removes_transform_and_inputs() -> None:
    recipe = Recipe(
        transform=Transform("smoothquant", alpha=0.4),
        overrides=(
            Override("*.up", transform={"alpha": 0.6}, inputs={"format": "fp8"}),
            Override("*.down", transform=None),
            Override("*.q", transform={"method": "awq"}, inputs={}),
        ),
    )
    up, down, q, o = (recipe.for_layer(f"layers.0.{name}") for name in ("up", "down", "q", "o"))
    assert (up.transform, up.inputs) == (Transform("smoothquant", alpha=0.6), Inputs())
    assert (down.transform, down.inputs) == (None, None)
    assert (q.transform, q.inputs) == (Transform("awq", alpha=0.4), None)
    assert (o.transform, o.inputs) == (Transform("smoothquant", alpha=0.4), None)
    added = Recipe(overrides=(Override("up", transform={"method": "slim-quant-o"}),))
    assert added.for_layer("up").transform == Transform("slim-quant-o")


def test_an_override_may_use_another_solver_where_its_steps_go_together() -> None:
    recipe = Recipe.from_yaml(
        "overrides: [{match: up, prune: {method: sparsegpt}, solve: {method: second-order}},"
        " {match: down, solve: {method: alternate, rounds: 3}}]"
    )
    assert recipe.for_layer("up").solve == Solve("second-order")
    assert recipe.for_layer("down").solve == Solve("alternate", rounds=3)
    with pytest.raises(RecipeError, match=r"^prune\.method: wanda"):
        Recipe(overrides=(Override("up", solve={"method": "second-order"}),))


def test_true_and_false_are_read_as_yaml_writes_them() -> None:
    recipe = Recipe.from_yaml("adapter: {sparse: yes}\nsolve: {correct_bias: on}")
    assert recipe.adapter.sparse is recipe.solve.correct_bias is True
    assert recipe.adapter.fast is recipe.solve.low_rank_first is False
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and again.digest() == recipe.digest()
    assert "sparse: true" in recipe.to_yaml()


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [(0.1, (64, 128), 6), (0.1, (128, 64), 6), (0.1, (5, 5), 1), (0.5, (3, 9), 1), (7, (4, 4), 7)],
)
def test_a_share_is_of_the_smaller_side_and_a_number_is_itself(
    rank: float, shape: tuple[int, int], expected: int
) -> None:
    assert Adapter(rank=rank).rank_for(*shape) == expected


def test_the_digest_is_the_hash_of_the_canonical_form_in_any_order_of_keys() -> None:
    recipe = Recipe.from_yaml(OVERRIDDEN)
    text = json.dumps(recipe.to_dict(), sort_keys=True)
    assert recipe.digest() == hashlib.sha256(text.encode()).hexdigest()
    backwards = yaml.safe_dump(dict(reversed(recipe.to_dict().items())), sort_keys=False)
    assert Recipe.from_yaml(backwards).digest() == recipe.digest()


def test_equal_recipes_have_one_digest_however_a_number_is_written() -> None:
    whole, real = Recipe(adapter=Adapter(rank=8)), Recipe(adapter=Adapter(rank=8.0))
    assert whole == real
    assert whole.digest() == real.digest()
    assert Recipe.from_yaml(whole.to_yaml()).digest() == whole.digest()


OTHERS: list[dict[str, Any]] = [
    {"prune": None},
    {"prune": Prune("magnitude")},
    {"prune": Prune(n=1)},
    {"prune": Prune(m=8)},
    {"quantize": Quantize("slim-histogram")},
    {"quantize": Quantize("absmax")},
    {"quantize": Quantize("absmax", granularity="channel")},
    {"quantize": Quantize(group=64)},
    {"quantize": None},
    {"quantize": Quantize(bits=3)},
    {"prune": Prune(sparsity=0.5)},
    {"prune": Prune(sparsity=0.5, scope="layer")},
    {"prune": Prune("mask-file", path="masks.npz")},
    {"prune": Prune("mask-file", path="other.npz")},
    {"adapter": None},
    {"adapter": Adapter(sparse=True)},
    {"adapter": Adapter(fast=True)},
    {"solve": Solve(correct_bias=True)},
    {"solve": Solve("alternate")},
    {"solve": Solve("alternate", rounds=9)},
    {"solve": Solve("alternate", low_rank_first=True)},
    {"transform": Transform()},
    {"transform": Transform("smoothquant")},
    {"transform": Transform("smoothquant", alpha=0.6)},
    {"transform": Transform("slim-quant-o", share=0.02)},
    {"transform": Transform("slim-quant-o", factor=3.0)},
    {"inputs": Inputs()},
    {"tune": Tune()},
    {"tune": Tune("clipping"), "quantize": Quantize("absmax"), "adapter": None},
    {"tune": Tune("affine"), "quantize": Quantize("absmax"), "adapter": None},
    {"tune": Tune(epochs=11)},
    {"tune": Tune(rate=0.02)},
    {"adapter": Adapter("naive")},
    {"adapter": Adapter(rank=0.11)},
    {"adapter": Adapter(bits=32)},
    {"adapter": Adapter(group=64)},
    {"calibration": Calibration(samples=65)},
    {"calibration": Calibration(length=513)},
    {"calibration": Calibration(batch=9)},
    {"calibration": Calibration(seed=1)},
    {"skip": ()},
    {"skip": ("lm_head", "up")},
    {"skip": ("up", "lm_head")},
    {"overrides": (Override("up"),)},
    {"overrides": (Override("up", prune=None),)},
    {"overrides": (Override("up", prune={"n": 1}),)},
    {"overrides": (Override("up", quantize={"group": 1}),)},
    {"overrides": (Override("up", adapter={"group": 1}),)},
    {"overrides": (Override("up", transform=None),)},
    {"overrides": (Override("up", inputs={"format": "fp8"}),)},
    {"overrides": (Override("up", solve={"rounds": 9}),)},
]


def test_the_digest_differs_when_anything_differs() -> None:
    found = [Recipe(), *(Recipe(**change) for change in OTHERS)]
    for one, two in itertools.combinations(found, 2):
        assert one.digest() != two.digest(), (one, two)


def test_a_recipe_is_loaded_as_it_is_by_name_or_from_a_file(tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(OVERRIDDEN)
    path = tmp_path / "mine.yaml"
    path.write_text(OVERRIDDEN)
    assert Recipe.load(recipe) is recipe
    assert Recipe.load("slim-q") == Recipe.preset("slim-q")
    assert Recipe.load(path) == Recipe.load(str(path)) == recipe


@pytest.mark.parametrize("missing", ["none.yaml", "slimm", "."])
def test_a_missing_file_is_named_with_the_presets(missing: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(str(tmp_path / missing))
    assert str(tmp_path / missing) in str(caught.value)
    assert all(name in str(caught.value) for name in PRESETS)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\xff\xfe\x80 binary")
    with pytest.raises(RecipeError):
        Recipe.load(path)
