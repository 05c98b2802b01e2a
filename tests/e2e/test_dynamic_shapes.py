"""A compressed program takes every shape the source takes, in memory and from either file form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from models import LONGEST, RECIPES, answer, captured, case, compressed, emulate, ids, normal
from torch import Tensor
from torch.export import ExportedProgram

import slimfx

FORMS = ("memory", "op", "aten")
KINDS = ("llama", "bert")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ExportedProgram]:
    """(kind, form[, recipe]) -> the compressed program as it is in that form."""
    folder: Path = tmp_path_factory.mktemp("programs")

    @cache
    def made(kind: str, form: str, recipe: str = "slim-q") -> ExportedProgram:
        if recipe in RECIPES:
            small = compressed(kind, recipe)
        else:
            small = slimfx.compress(captured(kind), recipe, case(kind).batches)
        if form == "memory":
            return small
        slimfx.save(small, folder / f"{kind}.{form}", form=form, verify=False)
        return slimfx.load(folder / f"{kind}.{form}")

    return made


Programs = Callable[..., ExportedProgram]


def text(kind: str, batch: int, length: int) -> dict[str, Tensor]:
    inputs = {"input_ids": ids(batch * 100 + length, batch, length)}
    if kind == "bert":
        inputs["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
        inputs["attention_mask"][0, 1 + length // 2 :] = 0
    return inputs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_and_length_answers_as_the_eager_model(
    kind: str, form: str, program: Programs
) -> None:
    emulated, _ = emulate(case(kind), compressed(kind, "slim-q"), RECIPES["slim-q"])
    module = program(kind, form).module()
    for batch in (1, 2, 3, 4):
        for length in (2, 3, 17, LONGEST):
            inputs = text(kind, batch, length)
            found = module(**inputs)
            assert found.shape[:2] == (batch, length)
            torch.testing.assert_close(found, answer(emulated, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["encoder layer", "in out"])
@pytest.mark.parametrize("recipe", ["slim-q", "50%"])
def test_the_first_dimension_stays_free(
    kind: str, form: str, recipe: str, program: Programs
) -> None:
    emulated, _ = emulate(case(kind), compressed(kind, recipe), RECIPES[recipe])
    module = program(kind, form, recipe).module()
    [(name, example)] = case(kind).inputs.items()
    for batch in (1, 2, 3, 4, 9):
        inputs = {name: normal(batch, batch, *example.shape[1:])}
        torch.testing.assert_close(module(**inputs), answer(emulated, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "encoder layer"])
def test_inputs_in_fp8_leave_the_first_dimension_free(kind: str, program: Programs) -> None:
    source = captured(kind).range_constraints
    memory = program(kind, "memory", "smoothquant")
    assert memory.range_constraints == source
    [(name, example)] = case(kind).inputs.items()
    for form in ("op", "aten"):
        loaded = program(kind, form, "smoothquant")
        ranges = loaded.range_constraints.values()
        assert sorted(map(str, ranges)) == sorted(map(str, source.values()))
        for batch in (1, 2, 5):
            inputs = {name: normal(batch, batch, *example.shape[1:]) * 10**batch}
            found, expected = loaded.module()(**inputs), memory.module()(**inputs)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "encoder layer", "in out"])
def test_the_ranges_are_those_of_the_source(kind: str, program: Programs) -> None:
    source = captured(kind).range_constraints
    assert source
    assert program(kind, "memory").range_constraints == source
    for form in ("op", "aten"):
        loaded = program(kind, form).range_constraints
        assert sorted(map(str, loaded.values())) == sorted(map(str, source.values())), form


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_beyond_the_longest_is_refused_as_by_the_source(
    form: str, program: Programs
) -> None:
    tokens = ids(1, 2, LONGEST + 1)
    for each in (captured("llama"), program("llama", form)):
        with pytest.raises((AssertionError, RuntimeError), match="64"):
            each.module()(input_ids=tokens)


def test_a_program_of_fixed_shapes_stays_one() -> None:
    x = normal(1, 20, 16)
    source = torch.export.export(case("mlp").model, (x,))
    small = slimfx.compress(source, "slim", [x])
    assert small.range_constraints == source.range_constraints == {}
    assert small.module()(x).shape == (20, 8)
    with pytest.raises((AssertionError, RuntimeError)):
        small.module()(x[:7])
