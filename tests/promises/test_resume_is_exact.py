"""Promise 6: a compression that was killed and resumed gives the bytes of one that was not."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from models import RECIPES, captured, case

import slimfx
from slimfx import journal
from slimfx.errors import JournalError

KIND = "llama"


def make(folder: Path, recipe: str = "slim", killed_at: int = -1) -> bytes:
    """Compress and save; die after so many reports of progress."""
    reports = 0

    def tell(share: float, what: str) -> None:
        nonlocal reports
        if reports == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        reports += 1

    with journal.opened(folder / "journal") as book:
        small = slimfx.compress(
            captured(KIND), RECIPES[recipe], case(KIND).batches, journal=book, progress=tell
        )
        slimfx.save(small, folder / "small.pt2", verify=False)
    return (folder / "small.pt2").read_bytes()


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = make(tmp_path)
    fork = multiprocessing.get_context("fork")
    for killed_at in (3, 5):
        work = fork.Process(target=make, args=(tmp_path, "slim", killed_at))
        work.start()
        work.join(60)
        assert work.exitcode == -signal.SIGKILL
    with pytest.raises(JournalError, match="another recipe"):
        make(tmp_path, "int4")
    (tmp_path / "small.pt2").unlink()
    assert make(tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt2"]
