"""Compressed programs with a cache in files: checked, stepped through, and alone with torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ids
from slimfx.passes.inputs import module_of
from slimfx.runtime.targets import onnx
from test_cache import PROMPT, TOKENS, stepped
from test_cache_compressed import small, words
from torch import Tensor

import slimfx
from slimfx.generate import generate
from slimfx.stepper import stepper

_ALONE = """
import sys, torch
compiled, path, prompt = sys.argv[1] == "aoti", sys.argv[2], list(map(int, sys.argv[3].split()))
run = torch._inductor.aoti_load_package(path) if compiled else torch.export.load(path).module()
for again in range(2):
    new, place, tokens = torch.tensor([prompt]), torch.arange(len(prompt)), []
    with torch.no_grad():
        for _ in range(20):
            new = run(input_ids=new, cache_position=place)[:, -1:].argmax(-1)
            place = place[-1:] + 1
            tokens.append(int(new))
    print(*tokens)
assert not {"slimfx", "transformers", "tokenizers"} & set(sys.modules)
"""


def alone(kind: str, path: Path, prompt: Tensor) -> list[str]:
    """What a process with torch alone says, twice."""
    text = " ".join(map(str, prompt[0].tolist()))
    command = [sys.executable, "-c", _ALONE, kind, path, text]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("form", ["op", "aten"])
def test_a_file_is_checked_and_stepped_through(form: str, tmp_path: Path) -> None:
    program, prompt = small("slim"), ids(3, 1, PROMPT)
    [expected] = stepped(module_of(program), prompt)
    path = tmp_path / "small.pt2"
    slimfx.save(program, path, form=form, verify=False)
    assert slimfx.check(path).identical
    text = "".join(generate(path, words(prompt[0].tolist()), tokens=TOKENS))
    assert text == words(expected)
    if form == "aten":
        assert alone("torch", path, prompt) == [" ".join(map(str, expected))] * 2
    else:
        slimfx.save(program, tmp_path / "again.pt2", form=form, verify=False)
        assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()


def test_machine_code_keeps_its_cache_between_calls(tmp_path: Path) -> None:
    program, prompt = small("slim"), ids(3, 1, PROMPT)
    [expected] = stepped(module_of(program), prompt)
    path = tmp_path / "native.pt2"
    slimfx.export(program, "aoti", path)
    assert alone("aoti", path, prompt) == [" ".join(map(str, expected))] * 2
    package = stepper(path)
    for _ in range(2):
        text = "".join(generate(package, words(prompt[0].tolist()), tokens=TOKENS))
        assert text == words(expected)


def test_torch_compile_keeps_the_cache() -> None:
    program, prompt = small("int4"), ids(3, 1, PROMPT)
    compiled = torch.compile(module_of(program), backend="aot_eager")
    assert stepped(compiled, prompt) == stepped(module_of(program), prompt)


def test_a_cache_that_the_caller_keeps_is_kept(tmp_path: Path) -> None:
    """ONNX has no state: its file takes the keys and values that the calls before gave."""
    program, prompts = small("slim"), [words(row.tolist()) for row in ids(5, 2, 7)]
    alone = ["".join(generate(program, prompt, tokens=9)) for prompt in prompts]
    onnx.save(program, tmp_path / "small.onnx")
    model = stepper(tmp_path / "small.onnx")
    assert model.cached
    for prompt, text in zip(prompts, alone):
        assert "".join(generate(model, prompt, tokens=9)) == text
    assert generate(model, prompts, tokens=9) == alone
