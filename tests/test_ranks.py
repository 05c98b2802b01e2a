"""Several processes: the same bytes as one, and an end for all when one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import captured
from ranks_job import JOBS
from slimfx.passes.base import with_state
from test_finetune import with_tokenizer

import slimfx
import slimfx.ranks
from slimfx import calibrate
from slimfx.errors import PlanError, SlimError, SolveError
from slimfx.journal import Journal, finished
from slimfx.ranks import ALONE, Ranks, attempt, shares

HERE = Path(__file__).parent
DIES = """
import os, signal, sys
from pathlib import Path
import slimfx
from ranks_job import JOBS, program_of
from slimfx import journal, ranks

def tell(share, what):
    if mine.own == 1 and what == "model.model.layers.1.mlp.up_proj":
        os.kill(os.getpid(), signal.SIGKILL)

with ranks.joined() as mine:
    kind, recipe = JOBS["diagonal"]
    program, batches = program_of(kind)
    with journal.opened(Path(sys.argv[1]), mine) as book:
        small = slimfx.compress(
            program, recipe, batches, progress=tell, journal=book, ranks=mine
        )
        slimfx.save(small, sys.argv[2], verify=False)
"""


def start(count: int, *words: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these words in so many processes of one thread each."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(many if count > 1 else []), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_one_two_and_three_processes_come_to_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        done = start(count, HERE / "ranks_job.py", folder)
        assert done.returncode == 0, done.stderr
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert set(made[0]) == {f"{name}{kept}.pt2" for name in JOBS for kept in ("", "-kept")}
    assert made[0] == made[1] == made[2]


def test_a_process_that_dies_stops_all_and_the_journal_goes_on_with_one(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    kept, small = tmp_path / "journal", tmp_path / "small.pt2"
    done = start(2, script, kept, small)
    assert done.returncode != 0
    assert not small.exists()
    assert finished(Journal(kept)) == 2  # the embedding, and the first layer
    done = start(1, script, kept, small)
    assert done.returncode == 0, done.stderr
    assert not kept.exists()
    whole = tmp_path / "whole.pt2"
    assert start(1, script, kept, whole).returncode == 0
    assert small.read_bytes() == whole.read_bytes()


def test_the_command_in_two_processes_says_what_it_made_once(tmp_path: Path) -> None:
    dense, text, small = tmp_path / "dense.pt2", tmp_path / "text.txt", tmp_path / "small.pt2"
    program = with_tokenizer(captured("llama"))
    slimfx.save(program, dense)
    text.write_text(" ".join(f"w{i * 7 % 90}" for i in range(400)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: slim\nadapter: {group: 4}\ncalibration: {samples: 4, length: 32}\n")
    words = ["-m", "slimfx", "compress", dense, "-r", recipe, "-d", text, "-o", small, "--json"]
    done = start(2, *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == small.stat().st_size
    two = small.read_bytes()
    assert start(1, *words).returncode == 0
    assert small.read_bytes() == two

    bad = "model.model.layers.1.mlp.down_proj.weight"  # one process solves it, both say so
    state = {bad: torch.nn.Parameter(program.state_dict[bad] * torch.nan)}
    slimfx.save(with_state(program, state), dense, verify=False)
    done = start(2, *words)
    assert done.returncode != 0
    assert done.stderr.count("down_proj: 2048 of 2048 weights are NaN or infinite") == 2
    assert small.read_bytes() == two


def test_a_search_in_two_processes_is_that_of_one_and_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMFX_CACHE", str(tmp_path / "cache"))
    dense, text, small = tmp_path / "dense.pt2", tmp_path / "text.txt", tmp_path / "small.pt2"
    slimfx.save(with_tokenizer(captured("llama")), dense)
    text.write_text(" ".join(f"w{i * 7 % 90}" for i in range(400)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: joint-q\ncalibration: {samples: 4, length: 32, batch: 1}\n")
    words = ["-m", "slimfx", "compress", dense, "-r", recipe, "-d", text, "-o", small]
    words += ["--bits", "5", "--layouts", "2:4 int4,int4"]
    made, kept = [], []
    for count in (2, 1, 2):  # the second finds what the first kept, the third searches again
        done = start(count, *words)
        assert done.returncode == 0, done.stderr
        made.append(small.read_bytes())
        [file] = (tmp_path / "cache").glob("search-*.json")
        kept.append((file.read_bytes(), file.stat().st_mtime_ns))
        if count == 1:
            file.unlink()
    assert made[0] == made[1] == made[2]
    assert kept[0] == kept[1]
    assert kept[0][0] == kept[2][0]


def test_parts_are_put_together_in_order_and_errors_are_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(ALONE.each([3, 1, 2], lambda part: part * 10)) == [30, 10, 20]
    assert ALONE.once(lambda: 5) == 5
    with pytest.raises(PlanError, match="one line"):
        list(ALONE.each([1], lambda part: (_ for _ in ()).throw(PlanError("one line"))))
    found = attempt(lambda: (_ for _ in ()).throw(SolveError("no")))
    assert isinstance(found, SolveError)

    def ended(*_: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(slimfx.ranks, "_broadcast", ended)
    monkeypatch.setattr(Ranks, "own", 0)
    monkeypatch.setattr(Ranks, "size", 2)
    group: Any = object()
    with pytest.raises(SlimError, match="heard no more of process 1: one of 2 has ended"):
        Ranks(group).told(1, None)


def test_every_batch_is_in_one_share_and_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 5, 16, 17, 128):
        cut = shares(count)
        assert [i for share in cut for i in share] == list(range(count))
        assert max(map(len, cut)) - min(map(len, cut)) <= 1
        assert len(cut) == min(count, 16)
    monkeypatch.setattr(Ranks, "size", 3)
    batches = [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}] * 20
    seen = []
    for own in range(3):
        monkeypatch.setattr(Ranks, "own", own)
        seen += list(calibrate.start(captured("llama"), batches, Ranks()).batches)
    assert sorted(seen) == list(range(20))
