"""A compiled package runs in a C++ program and in a Python process that know only torch.

One compile and one build for the whole file, through the commands of examples/cpp_runner.
"""

from __future__ import annotations

import fcntl
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import compressed_demo_lm
from slimfx.passes.lower_cpu import lower_cpu
from slimfx.runtime.manifest import manifest_of
from tokenizers import Tokenizer
from torch import Tensor
from torch.export import ExportedProgram

import slimfx

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp_runner"
PROMPT = "The function returns"
LONGEST = 512
"""Tokens the demo model takes."""
TOLERANCE = 1e-5
"""Of the largest logit; 5.8e-7 seen."""
LARGEST_CODE = 3_000_000
"""Bytes that a package may have beyond its tensors; 2.60 million seen."""


@dataclass(frozen=True)
class Made:
    """What prepare.py wrote and said, and the runner."""

    package: Path
    vocabulary: Path
    ids: str
    runner: Path

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([self.runner, *words], capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    return compressed_demo_lm("slim-q")


@pytest.fixture(scope="module")
def folder(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once, by the first of pytest-xdist's workers to come."""
    skip_without("g++")
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    made = base / "cpp_runner"
    with (base / "cpp_runner.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            part = base / "cpp_runner.part"
            part.mkdir(exist_ok=True)
            slimfx.save(program, part / "small.pt2", verify=False)
            script = EXAMPLE / "prepare.py"
            said = must_run(sys.executable, script, part / "small.pt2", part, PROMPT)
            (part / "ids").write_text(said)
            part.rename(made)
    return made


@pytest.fixture(scope="module")
def made(folder: Path) -> Made:
    """The runner as well; skips where it cannot be built."""
    skip_without("cmake", "make")
    build = folder / "build"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (build / "runner").exists():
            prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
            must_run("cmake", "-S", EXAMPLE, "-B", build, prefix)
            must_run("cmake", "--build", build)
    ids = (folder / "ids").read_text().strip()
    return Made(folder / "package.pt2", folder / "vocabulary.txt", ids, build / "runner")


def skip_without(*commands: str) -> None:
    missing = [name for name in commands if shutil.which(name) is None]
    if missing:
        pytest.skip(f"this machine has no {', '.join(missing)}, which the C++ runner is built with")


def must_run(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def eager(program: ExportedProgram) -> Callable[[list[int]], Tensor]:
    """The logits after a text, from the program's reference operators."""
    module = program.module()

    def logits(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return module(input_ids=torch.tensor([ids]))[0, -1]

    return logits


def difference(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("length", [3, 100, 512, 600])
def test_logits_are_those_of_the_program(
    made: Made, eager: Callable[[list[int]], Tensor], tmp_path: Path, length: int
) -> None:
    ids = torch.randint(1, 4096, (length,), generator=torch.Generator().manual_seed(length))
    text = " ".join(map(str, ids.tolist()))
    done = made.run(made.package, made.vocabulary, text, "1", "--logits", tmp_path / "logits")
    assert done.returncode == 0 and done.stderr == b""
    found = torch.frombuffer(bytearray((tmp_path / "logits").read_bytes()), dtype=torch.float32)
    assert found.shape == (4096,)
    assert difference(found, eager(ids.tolist()[-LONGEST:])) < TOLERANCE


def test_one_token_is_enough(
    made: Made, eager: Callable[[list[int]], Tensor], tmp_path: Path
) -> None:
    made.run(made.package, made.vocabulary, "455", "1", "--logits", tmp_path / "logits")
    found = torch.frombuffer(bytearray((tmp_path / "logits").read_bytes()), dtype=torch.float32)
    assert difference(found, eager([455])) < TOLERANCE


def test_text_is_that_of_greedy_decoding(made: Made, program: ExportedProgram) -> None:
    wanted = "".join(slimfx.generate(program, PROMPT, tokens=8))
    done = made.run(made.package, made.vocabulary, made.ids, "8")
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode() == wanted
    assert len(wanted.split()) > 4


def test_the_end_token_ends_the_text(made: Made, tmp_path: Path) -> None:
    lines = made.vocabulary.read_text().splitlines()
    whole = made.run(made.package, made.vocabulary, made.ids, "4").stdout
    tokens = Tokenizer.from_str(manifest_of(compressed_demo_lm("slim-q")).tokenizer or "")
    third = tokens.encode(whole.decode(), add_special_tokens=False).ids[2]
    lines[third] = "end"
    (tmp_path / "vocabulary.txt").write_text("\n".join(lines))
    cut = made.run(made.package, tmp_path / "vocabulary.txt", made.ids, "4").stdout
    assert 0 < len(cut) < len(whole) and whole.startswith(cut)


def test_the_vocabulary_holds_each_token_s_bytes(folder: Path, program: ExportedProgram) -> None:
    manifest = manifest_of(program)
    assert manifest.tokenizer is not None
    lines = (folder / "vocabulary.txt").read_text().splitlines()
    tokenizer = Tokenizer.from_str(manifest.tokenizer)
    assert len(lines) == tokenizer.get_vocab_size()
    assert [i for i, line in enumerate(lines) if line == "end"] == [manifest.eos_token]
    lines[0] = ""
    for i, line in enumerate(lines):
        text = bytes.fromhex(line).decode(errors="replace")
        assert tokenizer.decode([i]) == text
    text = "Grüße, 世界 \U0001f600\n\tdef f(x):"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(bytes.fromhex(lines[i]) for i in ids).decode() == text


def test_prepare_refuses_another_kind_of_tokenizer() -> None:
    vocabulary = runpy.run_path(str(EXAMPLE / "prepare.py"))["vocabulary"]
    words = '{"model": {"type": "WordPiece"}, "decoder": {"type": "WordPiece"}}'
    with pytest.raises(slimfx.SlimError, match="byte-level BPE"):
        vocabulary(words, None)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "usage: runner"),
        (["PACKAGE", "WORDS", "1 2"], "usage: runner"),
        (["PACKAGE", "WORDS", "1 2", "3", "--logit", "file"], "usage: runner"),
        (["absent.pt2", "WORDS", "1 2", "3"], "absent.pt2: no such file"),
        (["PACKAGE", "absent.txt", "1 2", "3"], "absent.txt: no such file"),
        (["WORDS", "WORDS", "1 2", "3"], "vocabulary.txt: PytorchStreamReader failed"),
        (["PROGRAM", "WORDS", "1 2", "3"], "small.pt2: not a package that slimfx compiled"),
        (["PACKAGE", "PACKAGE", "1 2", "3"], "package.pt2: not a vocabulary"),
        (["PACKAGE", "WORDS", "The function", "3"], "'The function': not whole numbers"),
        (["PACKAGE", "WORDS", "1 -2", "3"], "'1 -2': not whole numbers"),
        (["PACKAGE", "WORDS", "1 4096", "3"], "token 4096 is not in"),
        (["PACKAGE", "WORDS", "1 2", "0"], "'0': not a number of tokens"),
        (["PACKAGE", "WORDS", "1 2", "1", "--logits", "/absent/file"], "cannot be written"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_1(
    made: Made, words: list[str], sentence: str
) -> None:
    named = {"PACKAGE": made.package, "WORDS": made.vocabulary}
    named["PROGRAM"] = made.package.with_name("small.pt2")
    refused(made, [named.get(word, word) for word in words], sentence)


@pytest.mark.parametrize(
    "before, after, sentence",
    [
        (b'"input_ids"', b'"input"', "does not take one input_ids, int64"),
        (b'"torch.int64"', b'"torch.int32"', "does not take one input_ids, int64"),
        (b"[[1, ", b"[[4, ", "does not take one input_ids, int64"),
        (b"]]}]", b']]}, {"name": "attention_mask"}]', "does not take one input_ids, int64"),
    ],
)
def test_a_package_for_another_input_is_refused(
    made: Made, tmp_path: Path, before: bytes, after: bytes, sentence: str
) -> None:
    changed = tmp_path / "other.pt2"
    with zipfile.ZipFile(made.package) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("slimfx/aoti.json"):
                assert data.count(before) == 1
                data = data.replace(before, after)
            new.writestr(name, data)
    refused(made, [changed, made.vocabulary, "1 2", "3"], sentence)


def refused(made: Made, words: list[str | Path], sentence: str) -> None:
    done = made.run(*words)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: ") and sentence in line


FRESH = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
logits = model(input_ids=torch.tensor([[int(word) for word in sys.argv[2].split()]]))
sys.stdout.buffer.write(logits[0, -1].detach().numpy().tobytes())
assert not {name for name in sys.modules if name.partition(".")[0] == "slimfx"}
"""


def test_python_with_torch_alone_gives_the_same_logits(
    folder: Path, eager: Callable[[list[int]], Tensor], tmp_path: Path
) -> None:
    ids = (folder / "ids").read_text().strip()
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, folder / "package.pt2", ids],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    assert difference(found, eager([int(word) for word in ids.split()])) < TOLERANCE


def test_the_package_is_its_tensors_and_little_more(folder: Path, program: ExportedProgram) -> None:
    lowered, _ = lower_cpu(program)
    tensors = [*lowered.state_dict.values(), *lowered.constants.values()]
    distinct = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}  # tied ones once
    code = (folder / "package.pt2").stat().st_size - sum(distinct.values())
    assert 0 < code < LARGEST_CODE
