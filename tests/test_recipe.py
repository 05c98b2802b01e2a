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
from slimfx.recipe import (
    PRESETS,
    Adapter,
    Calibration,
    LayerRecipe,
    Override,
    Prune,
    Quantize,
    Recipe,
    matches,
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
    m = draw(st.integers(2, 64))
    prune = Prune(draw(st.sampled_from(["magnitude", "wanda"])), draw(st.integers(1, m - 1)), m)
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    methods = ["absmax", "slim-quant"] if granularity == "tensor" else ["absmax"]
    counts = st.integers(1, 2**31)
    ranks = st.floats(0, 1, exclude_min=True, exclude_max=True) | st.integers(1, 4096).map(float)
    adapter = Adapter(
        draw(st.sampled_from(["naive", "slim-lora"])),
        draw(ranks),
        draw(st.sampled_from([4, 16, 32])),
        draw(counts),
    )
    patterns = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    changes = st.sampled_from([{}, None, {"rank": 3}, {"rank": 0.25, "bits": 4}])
    return Recipe(
        prune=draw(st.sampled_from([prune, None])),
        quantize=Quantize(draw(st.sampled_from(methods)), 4, granularity, draw(counts)),
        adapter=draw(st.sampled_from([adapter, None])),
        calibration=Calibration(draw(counts), draw(counts), draw(counts), draw(counts)),
        skip=tuple(draw(st.lists(patterns, max_size=3))),
        overrides=tuple(
            Override(draw(patterns), adapter=draw(changes)) for _ in range(draw(st.integers(0, 2)))
        ),
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
    for part in (Prune, Quantize, Adapter, Calibration):
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
        ("adapter: {ranks: 8}", "adapter.ranks", "rank", "bits, group, method, rank"),
        ("calibration: {sample: 8}", "calibration.sample", "samples", "batch, length"),
        ("overrides: [{macth: x}]", "overrides[0].macth", "match", "adapter, match"),
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
        ("quantize: null", "quantize"),
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
        ("overrides: [{match: x, quantize: null}]", "overrides[x].quantize"),
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
    {"adapter": None},
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
