"""The manifest: what is written is read, newer minor formats too, and damage is named."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import captured, compressed
from slimfx.runtime.manifest import FORMAT, LayerReport, Manifest, attach, manifest_of
from torch.export import ExportedProgram

from slimfx.errors import ArtifactError

LAYER = LayerReport(
    name="model.layers.0.mlp.up_proj",
    out_features=64,
    in_features=32,
    layout="2:4 int4",
    rank=3,
    bytes=1234,
    tokens=96,
    snr=12.345,
    snr_without_adapter=9.5,
    clipped=0.00125,
)
FULL = Manifest(
    form="aten",
    recipe={"prune": {"method": "wanda", "n": 2, "m": 4}, "adapter": None},
    layers=(LAYER, dataclasses.replace(LAYER, name="lm_head", rank=0, notes=("a rule", "another"))),
    skipped={"embed": "skipped by the recipe"},
    calibration={"batches": 2, "sha256": "ab" * 32},
    versions={"slimfx": "0.1.0", "torch": "2.13.0"},
    tokenizer='{"version": "1.0"}',
    eos_token=7,
)


def text_with(**changes: Any) -> str:
    """The full manifest as JSON, with other values for some keys."""
    return json.dumps({**json.loads(FULL.to_json()), **changes})


@pytest.mark.parametrize("manifest", [FULL, Manifest(), Manifest(tokenizer="x", eos_token=0)])
def test_what_is_written_is_read(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json(), manifest.tokenizer) == manifest


@given(
    name=st.text(),
    reason=st.text(),
    snr=st.floats(allow_nan=False),
    notes=st.lists(st.text(), max_size=3),
    eos=st.none() | st.integers(0, 1 << 40),
)
@settings(max_examples=50, deadline=None)
def test_any_names_reasons_and_numbers_are_read_back(
    name: str, reason: str, snr: float, notes: list[str], eos: int | None
) -> None:
    layer = dataclasses.replace(LAYER, name=name, snr=snr, notes=tuple(notes))
    manifest = Manifest(layers=(layer,), skipped={name: reason}, eos_token=eos)
    assert Manifest.from_json(manifest.to_json(), None) == manifest


def test_the_tokenizer_is_not_part_of_the_json() -> None:
    assert json.loads(FULL.to_json())["tokenizer"] is None
    assert FULL.to_json() == dataclasses.replace(FULL, tokenizer=None).to_json()


def test_the_json_does_not_depend_on_the_order_of_keys() -> None:
    other = dataclasses.replace(FULL, recipe=dict(reversed(list(FULL.recipe.items()))))
    assert other.to_json() == FULL.to_json()
    assert json.loads(FULL.to_json())["format"] == list(FORMAT)


@pytest.mark.parametrize("version", [[FORMAT[0], FORMAT[1] + 1], [FORMAT[0], 99], [FORMAT[0]]])
def test_a_newer_minor_format_is_read(version: list[int]) -> None:
    assert Manifest.from_json(text_with(format=version), FULL.tokenizer) == FULL


def test_keys_that_a_newer_minor_format_adds_are_left_out() -> None:
    text = text_with(format=[FORMAT[0], FORMAT[1] + 1], kernel="triton", more={"a": [1]})
    assert Manifest.from_json(text, FULL.tokenizer) == FULL


def test_keys_that_a_newer_minor_format_adds_to_a_layer_are_left_out() -> None:
    rows = [{**row, "kernel": "triton"} for row in json.loads(FULL.to_json())["layers"]]
    text = text_with(format=[FORMAT[0], FORMAT[1] + 1], layers=rows)
    assert Manifest.from_json(text, FULL.tokenizer) == FULL


def test_a_layer_that_an_older_slimfx_wrote_has_no_notes() -> None:
    rows = json.loads(FULL.to_json())["layers"]
    for row in rows:
        del row["notes"]
    layers = Manifest.from_json(text_with(layers=rows), None).layers
    assert [layer.notes for layer in layers] == [(), ()]


@pytest.mark.parametrize("major", [FORMAT[0] + 1, FORMAT[0] - 1, 99, -1])
def test_another_major_format_is_refused_with_what_to_install(major: int) -> None:
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(text_with(format=[major, 0]), None)
    assert f"format {major}" in str(caught.value)
    assert "'slimfx': '0.1.0'" in str(caught.value)


DAMAGED = {
    "nothing": "",
    "half": FULL.to_json()[:200],
    "not JSON": "manifest",
    "null": "null",
    "a list": "[]",
    "a string": '"x"',
    "a number": "7",
    "empty": "{}",
    "trailing text": FULL.to_json() + "}",
    "deep": "[" * 100_000,
    "deep value": '{"format": [1, 0], "recipe": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a huge number": '{"format": [' + "9" * 5000 + ", 0]}",
    "infinity": '{"format": [1e999, 0]}',
    "no format": json.dumps({"layers": []}),
    "format null": text_with(format=None),
    "format empty": text_with(format=[]),
    "format a string": text_with(format="x"),
    "format of strings": text_with(format=["1", "0"]),
    "format nested": text_with(format=[[1], 0]),
    "layers missing": json.dumps({"format": list(FORMAT)}),
    "layers null": text_with(layers=None),
    "layers a number": text_with(layers=3),
    "layers of numbers": text_with(layers=[3]),
    "layers of nothing": text_with(layers=[{}]),
    "a layer without a name": text_with(layers=[{"rank": 1}]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_manifest_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match=r"manifest is damaged|has format"):
        Manifest.from_json(DAMAGED[name], None)


WRONG_TYPES: dict[str, dict[str, Any]] = {
    "form a number": {"form": 3},
    "recipe a list": {"recipe": [1]},
    "skipped a list": {"skipped": ["a"]},
    "calibration a string": {"calibration": "x"},
    "versions null": {"versions": None},
    "end token a string": {"eos_token": "</s>"},
    "a layer's name a number": {"layers": [{**dataclasses.asdict(LAYER), "name": 5}]},
    "a layer's size a string": {"layers": [{**dataclasses.asdict(LAYER), "bytes": "5"}]},
    "a layer's notes a string": {"layers": [{**dataclasses.asdict(LAYER), "notes": "abc"}]},
    "a layer's notes null": {"layers": [{**dataclasses.asdict(LAYER), "notes": None}]},
    "a layer's note a number": {"layers": [{**dataclasses.asdict(LAYER), "notes": ["a", 3]}]},
    "a layer's ratio null": {"layers": [{**dataclasses.asdict(LAYER), "snr": None}]},
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="manifest is damaged"):
        Manifest.from_json(text_with(**WRONG_TYPES[name]), None)


def test_a_program_that_slimfx_has_not_seen_has_an_empty_manifest() -> None:
    assert manifest_of(captured("mlp")) == Manifest()


def test_attach_returns_the_same_program_with_its_manifest() -> None:
    program = fresh_program()
    assert attach(program, FULL) is program
    assert manifest_of(program) is FULL


def fresh_program() -> ExportedProgram:
    """A program no other test holds."""
    return captured("mlp").run_decompositions({})


def test_compress_reports_each_layer_with_what_it_cost() -> None:
    manifest = manifest_of(compressed("mlp", "slim"))
    assert [layer.name for layer in manifest.layers] == ["first", "second"]
    assert [(layer.out_features, layer.in_features) for layer in manifest.layers] == [
        (32, 16),
        (8, 32),
    ]
    for layer in manifest.layers:
        stored = [
            tensor
            for name, tensor in compressed("mlp", "slim").state_dict.items()
            if name.startswith(f"{layer.name}.slim_")
        ]
        assert layer.bytes == sum(tensor.nbytes for tensor in stored)
        assert layer.tokens == 40
        assert layer.snr > layer.snr_without_adapter > 0
    assert set(manifest.versions) == {"slimfx", "torch", "python"}
