"""The journal: what a killed job leaves, what goes on from it, what is refused."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import RECIPES, captured, case
from slimfx.passes.base import with_state
from slimfx.runtime import archive

import slimfx
from slimfx import journal
from slimfx.errors import ArtifactError, JournalError, SlimError
from slimfx.journal import Journal
from slimfx.plain import built, plain

NAME = "small.pt2"


class Stop(Exception):
    """Ends a job from within."""


def make(
    folder: Path, kind: str = "llama", recipe: str = "slim", stop: str = "", **changes: Any
) -> bytes:
    """Compress and save as the command does; stop before the layer or block of a name."""

    def tell(share: float, what: str) -> None:
        if stop and what == stop:
            raise Stop

    given = {"program": captured(kind), "calibration": case(kind).batches, **changes}
    with journal.opened(folder / "journal") as book:
        small = slimfx.compress(recipe=RECIPES[recipe], journal=book, progress=tell, **given)
        slimfx.save(small, book.folder / NAME, verify=False)
        archive.move(book.folder / NAME, folder / NAME)
    assert [path.name for path in folder.iterdir()] == [NAME]
    return (folder / NAME).read_bytes()


def stopped(folder: Path, **given: Any) -> int:
    """The blocks that a job finished which was stopped in its second layer."""
    with pytest.raises(Stop):
        make(folder, stop="model.model.layers.1.mlp.up_proj", **given)
    return journal.finished(Journal(folder / "journal"))


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("llama", "slim"), ("gpt2", "50%"), ("bert", "int4"), ("tied", "1:4"), ("mlp", "wanda")],
)
def test_a_journal_changes_nothing_and_is_gone(kind: str, recipe: str, tmp_path: Path) -> None:
    program = captured(kind)
    slimfx.save(
        slimfx.compress(program, RECIPES[recipe], case(kind).batches), tmp_path / NAME, verify=False
    )
    plain = (tmp_path / NAME).read_bytes()
    assert make(tmp_path, kind, recipe) == plain


def test_a_stopped_job_goes_on_behind_its_last_block(tmp_path: Path) -> None:
    whole = make(tmp_path)
    assert stopped(tmp_path) == 2  # the embedding, and the first layer
    told: list[str] = []
    with pytest.raises(Stop), journal.opened(tmp_path / "journal") as book:

        def tell(share: float, what: str) -> None:
            told.append(f"{what} {share:.2f}")
            raise Stop

        slimfx.compress(
            captured("llama"), RECIPES["slim"], case("llama").batches, journal=book, progress=tell
        )
    assert told == ["model.model.layers.1 0.50"]
    assert make(tmp_path) == whole


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("recipe", {"recipe": "int4"}),
        ("data", {"calibration": case("llama").batches[:1]}),
        ("program, weights", {"program": captured("qwen2")}),
    ],
)
def test_another_job_is_refused_by_what_differs(
    field: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    stopped(tmp_path)
    with pytest.raises(JournalError, match=rf"another ([a-z, ]*, )?{field}[;,]"):
        make(tmp_path, **changes)
    assert journal.finished(Journal(tmp_path / "journal")) == 2
    make(tmp_path)


def test_other_weights_and_other_versions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path)
    program = captured("llama")
    name = "model.model.norm.weight"
    state = {name: torch.nn.Parameter(program.state_dict[name] * 2)}
    with pytest.raises(JournalError, match="another weights;"):
        make(tmp_path, program=with_state(program, state))
    monkeypatch.setattr("platform.python_version", lambda: "3.0")
    with pytest.raises(JournalError, match="another versions;"):
        make(tmp_path)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with journal.opened(tmp_path / "journal"):
        again = journal.opened(tmp_path / "journal")
        with pytest.raises(JournalError, match="another process is at work"), again:
            raise AssertionError("opened twice")
        assert (tmp_path / "journal").is_dir()
    assert not (tmp_path / "journal").exists()


def test_nothing_is_left_where_no_block_was_finished(tmp_path: Path) -> None:
    with pytest.raises(SlimError, match="takes"):
        make(tmp_path, calibration=[{"wrong": torch.zeros(1)}])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(JournalError, match="no journal can be kept"):
        make(tmp_path / "missing")


def test_damage_is_named(tmp_path: Path) -> None:
    stopped(tmp_path)
    block = tmp_path / "journal" / "block-1.safetensors"
    whole = block.read_bytes()
    block.write_bytes(whole[:-9])
    with pytest.raises(ArtifactError, match=r"block-1\.safetensors"):
        make(tmp_path)
    block.write_bytes(whole)
    marker = tmp_path / "journal" / "block-1.json"
    text = marker.read_text()
    marker.write_text(text[:-9])
    with pytest.raises(JournalError, match=r"block-1\.json: cannot be read"):
        make(tmp_path)
    marker.write_text(text)
    make(tmp_path)


def test_a_full_disk_is_an_error_and_loses_no_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if len(list((tmp_path / "journal").glob("block-*.json"))) == 2:
            raise OSError(28, "No space left on device")
        return written(path, data)

    whole = make(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match="no space left"):
        make(tmp_path)
    assert journal.finished(Journal(tmp_path / "journal")) == 2
    monkeypatch.undo()
    assert make(tmp_path) == whole


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).T,
        torch.randn(1, 4).expand(5, 4),
        torch.randn(2, 1, 4).expand(2, 3, 4).transpose(0, 2),
        torch.randn(6, 8)[:, 2:5],
        torch.tensor(3.0),
        torch.zeros(0, 4),
    ],
)
def test_values_come_back_and_repeat_nothing(tensor: torch.Tensor) -> None:
    aside: dict[str, torch.Tensor] = {}
    described = json.loads(json.dumps(plain([tensor, 3, "x", None], "v", aside)))
    again, *rest = built(described, aside)
    assert torch.equal(again, tensor)
    assert sum(part.numel() for part in aside.values()) <= tensor.untyped_storage().nbytes() // 4
    assert rest == [3, "x", None]


def killed(folder: Path, after: float) -> None:
    """The same job, which may not live long."""
    signal.setitimer(signal.ITIMER_REAL, after)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    make(folder)


def kill_and_resume(folder: Path, times: int, seed: int) -> None:
    """Kill jobs at random moments until one ends; each must end with the same bytes."""
    captured("llama"), case("llama")  # so that a child has them
    began = time.perf_counter()
    whole = make(folder)
    seconds = time.perf_counter() - began
    draw, fork, deaths = random.Random(seed), multiprocessing.get_context("fork"), 0
    while deaths < times:
        (folder / NAME).unlink()
        longest = seconds
        while True:
            finished = journal.finished(Journal(folder / "journal"))
            work = fork.Process(target=killed, args=(folder, draw.uniform(0.01, longest)))
            work.start()
            work.join(60)
            if work.exitcode == 0:
                break
            assert work.exitcode == -signal.SIGKILL
            deaths += 1
            longest *= 1.3  # where the machine has become slow, too, one ends
            if not (folder / NAME).exists():  # killed while the journal was removed
                assert journal.finished(Journal(folder / "journal")) >= finished
        assert [path.name for path in folder.iterdir()] == [NAME]
        assert (folder / NAME).read_bytes() == whole


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 4, seed=0)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 20, seed=1)


def test_activations_in_half_the_bytes(tmp_path: Path) -> None:
    def kept(activations: str) -> tuple[int, torch.Tensor]:
        how = RECIPES["slim"].calibration
        how = dataclasses.replace(how, activations=activations)
        recipe = dataclasses.replace(RECIPES["slim"], calibration=how)
        program, sizes = captured("llama"), []

        def tell(share: float, what: str) -> None:
            sizes.append(sum(path.stat().st_size for path in tmp_path.glob("journal/live-1-*")))

        with journal.opened(tmp_path / "journal") as book:
            small = slimfx.compress(
                program, recipe, case("llama").batches, journal=book, progress=tell
            )
            slimfx.save(small, tmp_path / NAME, verify=False)
        answer = slimfx.load(tmp_path / NAME).module()(**case("llama").inputs)
        return max(sizes), answer

    (whole, exact), (half, rounded) = kept("exact"), kept("bfloat16")
    assert half < 0.6 * whole
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.05 * exact.norm()
