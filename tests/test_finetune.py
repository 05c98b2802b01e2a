"""Fine-tuning: what changes and what does not, resuming, what stops it, and its command."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import transformers
from models import (
    VOCABULARY,
    bits,
    captured,
    compressed,
    ids,
    same_tensors,
    tiny_llama,
    word_tokenizer,
)
from slimfx.passes.base import edit
from slimfx.runtime.manifest import Manifest, attach, manifest_of
from test_cli import from_json, run
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.functional import kl_div

import slimfx
from slimfx import Training
from slimfx.errors import FinetuneError, SlimError
from slimfx.finetune import _NotFinite, _watch
from slimfx.training_text import _order

TEXT = torch.arange(1, VOCABULARY).repeat(12)
"""Each token says what the next one is."""
QUICK = Training(tokens=16 * 32, length=32, accumulate=4, rate=0.05, save_every=1)
"""Four steps of four windows; `TEXT` has more."""


def with_tokenizer(program: ExportedProgram) -> ExportedProgram:
    """A copy that knows the words of the tiny vocabulary."""
    return attach(edit(program).finish(), Manifest(tokenizer=word_tokenizer()))


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def printed(command: list[Any]) -> str:
    """What a command prints, each of its processes on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(program: ExportedProgram) -> dict[str, Any]:
    return manifest_of(program).calibration["finetune"]


def loss_of(program: ExportedProgram, tokens: Tensor) -> float:
    return math.log(slimfx.evaluate(program, tokens, length=32).value)


@pytest.mark.parametrize("recipe", ["slim-q", "slim"])
def test_the_loss_falls_and_adapters_alone_change(recipe: str) -> None:
    program = compressed("llama", recipe)
    before = {name: bits(tensor) for name, tensor in program.state_dict.items()}
    tuned = slimfx.finetune(program, TEXT, how=QUICK)
    assert loss_of(tuned, TEXT) < loss_of(program, TEXT) - 0.1
    assert {name: bits(tensor) for name, tensor in program.state_dict.items()} == before
    changed = {name for name, tensor in tuned.state_dict.items() if bits(tensor) != before[name]}
    adapters = {name for name in before if ".slim_L" in name or ".slim_R" in name}
    assert changed <= {name for name in adapters if not name.endswith("indices")}
    assert len(changed) > 20  # of 28 matrices; a few codes may stay in so few steps
    assert str(tuned.graph) == str(program.graph)


def test_it_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    tuned = slimfx.finetune(compressed("llama", "slim-q"), TEXT, how=QUICK)
    slimfx.save(tuned, tmp_path / "tuned.pt2")
    again = slimfx.load(tmp_path / "tuned.pt2")
    assert same_tensors(again.state_dict, tuned.state_dict)
    assert figures(again) == figures(tuned)
    assert figures(again)["steps"] == 4
    assert figures(again)["tokens"] == QUICK.tokens


def test_the_seed_fixes_the_result_and_random_state_stays() -> None:
    program = compressed("llama", "slim")
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    one, same, other = (
        slimfx.finetune(program, TEXT, how=Training(512, 32, 4, 0.05, seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == state[1:]
    assert same_tensors(one.state_dict, same.state_dict)
    assert not same_tensors(one.state_dict, other.state_dict)


KILLED = """
import os, signal, sys
import torch, slimfx
steps = []
def tell(share, what):
    if what.startswith("step 3 "):
        os.kill(os.getpid(), signal.SIGKILL)
how = slimfx.Training(tokens=512, length=32, accumulate=4, rate=0.05, save_every=1)
text = torch.arange(1, 96).repeat(12)
slimfx.finetune(
    slimfx.load(sys.argv[1]), text, how=how, checkpoints=sys.argv[2], progress=tell
)
"""


def test_killed_half_way_and_resumed_the_weights_are_the_same(tmp_path: Path) -> None:
    program, folder = compressed("llama", "slim-q"), tmp_path / "checkpoints"
    slimfx.save(program, tmp_path / "small.pt2")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "small.pt2"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (folder / "checkpoint-2" / "trainer_state.json").exists()
    (folder / "checkpoint-3").mkdir()  # as if it had died while writing this one
    seen: list[str] = []
    resumed = slimfx.finetune(
        *(program, TEXT),
        how=QUICK,
        checkpoints=folder,
        resume=True,
        progress=lambda share, what: seen.append(what),
    )
    assert seen[0] == "step 3 of 4"
    straight = slimfx.finetune(program, TEXT, how=QUICK)
    assert same_tensors(resumed.state_dict, straight.state_dict)
    assert figures(resumed) == figures(straight)


def poisoned(program: ExportedProgram, token: int) -> ExportedProgram:
    """The program with an embedding that is infinite."""
    change = edit(program)
    name = "model.model.embed_tokens.weight"
    weight = program.state_dict[name].detach().clone()
    weight[token] = math.inf
    change.state_dict[name] = torch.nn.Parameter(weight, requires_grad=False)
    return change.finish()


def test_a_loss_that_is_no_number_stops_with_its_step_and_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    windows = ids(7, 16, 32) % 90
    windows[_order(16, 16, 0)[9], 5] = 95  # met in the third step
    program = poisoned(compressed("llama", "slim-q"), 95)
    with pytest.raises(FinetuneError) as caught:
        slimfx.finetune(program, windows.flatten(), how=QUICK, checkpoints=tmp_path / "c")
    said = f"The last good checkpoint: {tmp_path / 'c' / 'checkpoint-2'}"
    assert str(caught.value).startswith("step 3: the loss is nan; lower the rate (0.05).")
    assert str(caught.value).endswith(said)
    assert (tmp_path / "c" / "checkpoint-2" / "model.safetensors").exists()
    assert not (tmp_path / "c" / "checkpoint-3").exists()


def test_an_adapter_that_is_no_number_is_never_saved() -> None:
    value = torch.nn.Parameter(torch.tensor([1.0, math.nan]))
    watch = _watch(transformers.TrainerCallback, [value], 8, None)
    state = SimpleNamespace(global_step=2, max_steps=4)
    with pytest.raises(_NotFinite, match="an adapter is not finite"):
        watch.on_step_end(SimpleNamespace(gradient_accumulation_steps=4), state, None)
    assert state.global_step == 1


def divergence(program: ExportedProgram, dense: ExportedProgram, tokens: Tensor) -> float:
    with torch.no_grad():
        own, other = (p.module()(input_ids=tokens).log_softmax(-1) for p in (program, dense))
    return kl_div(own, other, reduction="sum", log_target=True).item() / tokens.numel()


def test_a_teacher_is_come_closer_to() -> None:
    program, dense, text = compressed("llama", "slim-q"), captured("llama"), ids(9, 16, 32)
    alone, taught = (
        slimfx.finetune(program, text.flatten(), how=QUICK, teacher=teacher)
        for teacher in (None, dense)
    )
    before, without, after = (divergence(p, dense, text) for p in (program, alone, taught))
    assert after < before
    assert after < without


# what is refused


def test_a_program_without_adapters_is_refused() -> None:
    with pytest.raises(SlimError, match="no adapters to train"):
        slimfx.finetune(compressed("llama", "wanda"), TEXT, how=QUICK)


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    program = with_tokenizer(compressed("llama", "slim-q"))
    small, text = tmp_path / "small.pt2", tmp_path / "text.txt"
    slimfx.save(program, small)
    text.write_text(" ".join(f"w{token}" for token in TEXT.tolist()))
    options = ["--data", text, "--tokens", 512, "--seq", 32, "--accumulate", 4, "--json"]
    found: list[dict[str, Any]] = []
    for start in (["-m", "slimfx"], [*TWO, "-m", "slimfx"]):
        tuned = tmp_path / f"tuned{len(found)}.pt2"
        command = [sys.executable, *start, "finetune", small, "-o", tuned, *options]
        found.append(json.loads(printed(command)))
        assert not tuned.with_name(f"{tuned.name}.checkpoints").exists()
    one, two = (slimfx.load(each["file"]) for each in found)
    assert found[0]["steps"] == found[1]["steps"] == 4
    assert found[0]["loss_last"] == pytest.approx(found[1]["loss_last"], rel=1e-4)
    tokens = ids(3, 2, 32) % 90
    logits = [each.module()(input_ids=tokens) for each in (program, one, two)]
    moved = (logits[1] - logits[0]).abs().max()
    assert (logits[1] - logits[2]).abs().max() < 0.02 * moved


def test_processes_that_do_not_divide_a_step_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(FinetuneError, match=r"3 processes share 4 windows a step"):
        slimfx.finetune(compressed("llama", "slim-q"), TEXT, how=QUICK)


def test_a_teacher_of_other_tokens_is_refused() -> None:
    other = slimfx.capture(tiny_llama(vocab_size=50).eval())
    with pytest.raises(FinetuneError, match="the teacher tells 50 tokens apart and the program 96"):
        slimfx.finetune(compressed("llama", "slim-q"), TEXT, how=QUICK, teacher=other)


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    program, folder = compressed("llama", "slim-q"), tmp_path / "c"
    slimfx.finetune(program, TEXT, how=QUICK, checkpoints=folder)
    with pytest.raises(FinetuneError, match="earlier run; resume it, or remove them"):
        slimfx.finetune(program, TEXT, how=QUICK, checkpoints=folder)
    other = Training(512, 32, 4, 0.04)
    with pytest.raises(FinetuneError, match="a run with another rate"):
        slimfx.finetune(program, TEXT, how=other, checkpoints=folder, resume=True)
    with pytest.raises(FinetuneError, match="a run with another sha256"):
        slimfx.finetune(
            program, TEXT + 1 - 1 * (TEXT > 9), how=QUICK, checkpoints=folder, resume=True
        )
    taught, other_one = tmp_path / "taught", compressed("llama", "slim")
    slimfx.finetune(program, TEXT, how=QUICK, teacher=program, checkpoints=taught)
    with pytest.raises(FinetuneError, match="a run with another teacher"):
        slimfx.finetune(
            program, TEXT, how=QUICK, teacher=other_one, checkpoints=taught, resume=True
        )
    with pytest.raises(FinetuneError, match="resume needs the folder"):
        slimfx.finetune(program, TEXT, how=QUICK, resume=True)


# the command


def test_the_command_writes_the_artifact_and_measures_it(tmp_path: Path) -> None:
    program = with_tokenizer(compressed("llama", "slim-q"))
    small, tuned, text = tmp_path / "small.pt2", tmp_path / "tuned.pt2", tmp_path / "text.txt"
    slimfx.save(program, small)
    text.write_text(" ".join(f"w{token}" for token in TEXT.tolist()))
    options = ("--tokens", 1024, "--seq", 32, "--accumulate", 4, "--rate", 0.05, "--text", text)
    found = from_json(run("finetune", small, "-d", text, "-o", tuned, *options, "--json"))
    assert found["steps"] == 8
    assert found["loss_last"] < found["loss_first"]
    assert found["perplexity_after"] < 0.9 * found["perplexity_before"]
    assert found["bytes"] == tuned.stat().st_size
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert slimfx.check(tuned).identical


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    slimfx.save(compressed("llama", "wanda"), tmp_path / "small.pt2")
    ran = run("finetune", tmp_path / "small.pt2", "-o", tmp_path / "tuned.pt2")
    assert ran.code == 1
    assert ran.err.strip().splitlines()[-1].startswith("slimfx: the program has no adapters")
    assert not (tmp_path / "tuned.pt2").exists()
