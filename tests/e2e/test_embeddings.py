"""A tied table in eight bits, through every target that has a place for it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from models import RECIPES, ids, tiny_llama
from torch.export import ExportedProgram

import slimfx
from slimfx.errors import ArtifactError


@pytest.fixture(scope="module")
def small() -> ExportedProgram:
    torch.manual_seed(0)
    program = slimfx.capture(tiny_llama(tie_word_embeddings=True).eval())
    recipe = dataclasses.replace(RECIPES["slim-q"], embeddings=8)
    return slimfx.compress(program, recipe, ids(1, 4, 16))


@pytest.mark.parametrize("form", ["op", "aten"])
def test_pt2(small: ExportedProgram, form: str, tmp_path: Path) -> None:
    slimfx.save(small, tmp_path / "small.pt2", form=form)
    assert slimfx.check(tmp_path / "small.pt2").identical


@pytest.mark.parametrize(
    ("target", "file", "limit"),
    [("aoti", "m.pt2", 1e-5), ("onnx", "m.onnx", 1e-5), ("pte", "m.pte", 0.05)],
)
def test_targets(
    small: ExportedProgram, target: str, file: str, limit: float, tmp_path: Path
) -> None:
    slimfx.export(small, target, tmp_path / file)
    assert slimfx.check(tmp_path / file).max_difference < limit


def test_a_hugging_face_folder_has_no_place_for_it(small: ExportedProgram, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        slimfx.export(small, "hf", tmp_path / "m")
