"""One compressed program in every form: each says the same, to the bit of its text."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import VOCABULARY, answer, compressed_demo_lm, ids, word_tokenizer
from slimfx.runtime.targets import aoti, hf, onnx, pt2, pte
from torch.export import ExportedProgram

import slimfx
from slimfx.check import measure, target_of
from slimfx.cli_export import TARGET_TABLE
from slimfx.errors import ArtifactError
from slimfx.export import TARGETS

NAMES = {"pt2": "m.pt2", "aoti": "m-aoti.pt2", "onnx": "m.onnx", "pte": "m.pte", "hf": "m-hf"}
EXACT = {"aoti": {"accuracy": "exact"}, "onnx": {"accuracy": "exact"}, "pte": {"accuracy": "exact"}}
PROMPT = "The function returns"
WORDS = "w7 w8 w9"
LOAD: dict[str, Callable[[Path], Callable[..., Any]]] = {
    "pt2": lambda path: pt2.load(path).module(),
    "aoti": aoti.load,
    "onnx": onnx.load,
    "pte": pte.load,
    "hf": hf.load,
}
TINY = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=64,
            n_layer=1,
            n_head=4,
            vocab_size=VOCABULARY,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.2,
        )
    ),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ),
}
"""A decoder whose weights lie as [in, out], and an encoder."""
TAKEN = [(kind, target) for kind in TINY for target in NAMES if (kind, target) != ("gpt2", "hf")]
"""compressed-tensors stores no Conv1D, of which GPT-2 is made."""


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExportedProgram]:
    """One of `TINY`, captured from a folder and compressed, once."""

    @cache
    def get(kind: str) -> ExportedProgram:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        TINY[kind]().save_pretrained(folder)
        (folder / "tokenizer.json").write_text(word_tokenizer(), encoding="utf-8")
        return slimfx.compress(slimfx.capture(folder), "slim-q", [given(kind, 4, 24)])

    return get


def given(kind: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Tokens, of which an encoder overlooks the last third."""
    inputs = {"input_ids": ids(length, rows, length)}
    if kind == "bert":
        inputs["attention_mask"] = (torch.arange(length) < length - length // 3).long()
        inputs["attention_mask"] = inputs["attention_mask"].repeat(rows, 1)
    return inputs


def test_every_target_is_here() -> None:
    assert set(NAMES) == set(TARGETS)
    for target in NAMES:
        assert re.search(rf"^{target} +\d\.\d\dx ", TARGET_TABLE, re.MULTILINE)


@pytest.mark.parametrize(("kind", "target"), TAKEN)
def test_other_models_answer_as_the_program_does(
    tiny: Callable[[str], ExportedProgram], tmp_path: Path, kind: str, target: str
) -> None:
    program, path = tiny(kind), tmp_path / NAMES[target]
    written = slimfx.export(program, target, path, **EXACT.get(target, {}))
    checked = measure(path)
    assert (checked.target, checked.bytes) == (target, written.bytes)
    assert checked.result.max_difference <= 1e-4
    run = LOAD[target](path)
    for shape in ((1, 9), (1 if target == "pte" else 3, 40)):
        x = given(kind, *shape)
        expected = answer(program.module(), x)
        assert (run(**x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    if kind == "gpt2":
        text = "".join(slimfx.generate(program, WORDS, tokens=20))
        assert "".join(slimfx.generate(path, WORDS, tokens=20)) == text
    else:
        assert checked.tokens_per_second is None


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


def test_a_command_says_nothing_of_the_libraries_below(artifacts: dict[str, Path]) -> None:
    command = [sys.executable, "-c", "from slimfx.cli import main; main()", "check"]
    done = subprocess.run(
        [*command, artifacts["hf"], "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["target"] == "hf"
    assert done.stderr.strip() == ""


def test_what_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"ends in none of \.pt2, \.pte, \.onnx"):
        slimfx.check(tmp_path / "a.bin")
    with pytest.raises(ArtifactError, match="target onnx takes no march, 'native' was given"):
        slimfx.export(compressed_demo_lm("slim-q"), "onnx", tmp_path / "m.onnx", march="native")
