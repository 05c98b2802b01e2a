"""Compressed programs with a cache: they say what those say that have none."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from models import (
    DEMO,
    QUICK,
    RECIPES,
    aten,
    count,
    demo_lm,
    ids,
    tiny_llama,
    word_tokenizer,
)
from slimfx.passes.decompose import slimfx_nodes
from slimfx.passes.inputs import module_of
from slimfx.runtime.manifest import Manifest, attach
from test_cache import PROMPT, recomputed, stepped
from test_cli import run
from torch import Tensor, nn
from torch.export import ExportedProgram

import slimfx
from slimfx.data import tokenizer_of
from slimfx.errors import CalibrationError
from slimfx.generate import generate
from slimfx.likelihood import reader
from slimfx.recipe import Calibration, Recipe


@cache
def model() -> nn.Module:
    """One layer; nothing may write to it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_llama(num_hidden_layers=1, intermediate_size=48).eval()


def calibration(batch: int, *, place: bool) -> list[dict[str, Tensor]]:
    """The same eight rows, so many at once, with their positions or without."""
    parts = ids(1, 8, 24).split(batch)
    more = {"cache_position": torch.arange(24)} if place else {}
    return [{"input_ids": part, **more} for part in parts]


@cache
def small(recipe: str) -> ExportedProgram:
    """The model with a cache under one of `RECIPES`, with words w0 to w95."""
    program = attach(slimfx.capture(model(), kv_cache=True), Manifest(tokenizer=word_tokenizer()))
    return slimfx.compress(program, RECIPES[recipe], calibration(1, place=True))


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


@pytest.mark.parametrize("recipe", ["slim", "int4", "50%"])
def test_a_compressed_cache_says_what_the_compressed_program_without_one_says(recipe: str) -> None:
    plain = slimfx.capture(model())
    plain = slimfx.compress(plain, RECIPES[recipe], calibration(8, place=False))
    prompt = ids(3, 1, PROMPT)
    expected = recomputed(plain.module(), prompt)
    assert stepped(module_of(small(recipe)), prompt) == expected
    assert expected != recomputed(model(), prompt)
    assert count(small(recipe), aten.index_copy_.default) == 2
    assert slimfx_nodes(small(recipe)) >= 7
    assert not small(recipe).state_dict["kv_cache.0.value"].any()


def test_the_compressed_demo_model_says_the_same_with_a_cache_and_without() -> None:
    how = dataclasses.replace(
        Recipe.preset("slim"), calibration=dataclasses.replace(QUICK, batch=1)
    )
    program = slimfx.capture(DEMO, kv_cache=True, max_length=64)
    remembers, forgets = slimfx.compress(program, how), slimfx.compress(demo_lm(), how)
    prompt = "The function returns"
    texts = [list(generate(each, prompt, tokens=20)) for each in (remembers, forgets)]
    assert texts[0] == texts[1] and len(texts[0]) >= 20
    start = tokenizer_of(program).encode(prompt).ids
    found, expected = (reader(each)[0]([tuple(start)])[0] for each in (remembers, forgets))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_perplexity_is_the_same_with_a_cache_of_any_rows() -> None:
    held = "Every object has an identity, a type and a value. " * 40
    values = [
        slimfx.evaluate(program, [held], samples=5, length=32).value
        for program in (
            demo_lm(),
            slimfx.capture(DEMO, kv_cache=True, max_length=32),
            slimfx.capture(DEMO, kv_cache=True, max_length=32, batch=3),
        )
    ]
    assert values[1:] == pytest.approx([values[0], values[0]], rel=1e-4)


def test_calibration_windows_come_in_the_rows_of_the_cache() -> None:
    program = slimfx.capture(model(), kv_cache=True, batch=2)
    program = attach(program, Manifest(tokenizer=word_tokenizer()))
    how = dataclasses.replace(
        RECIPES["int4"], calibration=Calibration(samples=3, length=16, batch=8)
    )
    found = slimfx.compress(program, how, [words([1 + i % 90 for i in range(400)])])
    assert len(stepped(found.module(), ids(3, 2, 5), 3)[1]) == 3
    with pytest.raises(CalibrationError, match="1 of 3 rows of tokens are left over"):
        slimfx.compress(program, how, ids(1, 3, 16))


def test_a_file_with_a_cache_is_compressed_while_its_weights_stay_in_files(tmp_path: Path) -> None:
    slimfx.save(slimfx.capture(DEMO, kv_cache=True, max_length=64), tmp_path / "cached.pt2")
    (tmp_path / "quick.yaml").write_text("preset: slim\ncalibration: {samples: 2, length: 32}\n")
    small = tmp_path / "small.pt2"
    ran = run("compress", tmp_path / "cached.pt2", "-o", small, "--recipe", tmp_path / "quick.yaml")
    assert ran.code == 0, ran.err
    assert slimfx.check(small).identical
    assert not slimfx.load(small).state_dict["kv_cache.0.value"].any()
