"""One compressed program in every form: each says the same, to the bit of its text."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import compressed_demo_lm

import slimfx
from slimfx.check import measure, target_of
from slimfx.errors import ArtifactError
from slimfx.export import TARGETS

NAMES = {"pt2": "m.pt2", "aoti": "m-aoti.pt2", "onnx": "m.onnx", "pte": "m.pte", "hf": "m-hf"}
EXACT = {"aoti": {"accuracy": "exact"}, "onnx": {"accuracy": "exact"}, "pte": {"accuracy": "exact"}}
PROMPT = "The function returns"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model for every target, inputs of its linears as they are."""
    folder = tmp_path_factory.mktemp("targets")
    program = compressed_demo_lm("slim-q")
    for target, name in NAMES.items():
        written = slimfx.export(program, target, folder / name, **EXACT.get(target, {}))
        assert written.bytes > 0
    return {target: folder / name for target, name in NAMES.items()}


@pytest.fixture(scope="module")
def text() -> str:
    return "".join(slimfx.generate(compressed_demo_lm("slim-q"), PROMPT, tokens=20))


def test_every_target_is_here() -> None:
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize("target", NAMES)
def test_it_answers_as_recorded_and_goes_on_as_the_program_does(
    artifacts: dict[str, Path], target: str, text: str
) -> None:
    path = artifacts[target]
    assert target_of(path) == target
    checked = measure(path)
    assert checked.result.max_difference <= 1e-4
    assert checked.tokens_per_second and checked.tokens_per_second > 0
    assert "".join(slimfx.generate(path, PROMPT, tokens=20)) == text


@pytest.mark.parametrize("target", NAMES)
def test_a_flipped_byte_is_refused(artifacts: dict[str, Path], target: str, tmp_path: Path) -> None:
    whole = artifacts[target]
    largest = max(
        (file for file in whole.rglob("*") if file.is_file()) if whole.is_dir() else [whole],
        key=lambda file: file.stat().st_size,
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    for file in [*whole.rglob("*"), *whole.parent.glob(f"{whole.name}*")]:
        if file.is_file():
            copy = tmp_path / file.relative_to(whole.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(bytes(data) if file == largest else file.read_bytes())
    with pytest.raises(ArtifactError):
        slimfx.check(tmp_path / whole.name)


def test_what_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"ends in none of \.pt2, \.pte, \.onnx"):
        slimfx.check(tmp_path / "a.bin")
    with pytest.raises(ArtifactError, match="target onnx takes no march, 'native' was given"):
        slimfx.export(compressed_demo_lm("slim-q"), "onnx", tmp_path / "m.onnx", march="native")
