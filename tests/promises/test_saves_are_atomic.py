"""Promise 5: killed at any write, a save leaves the old file or the new one, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from models import compressed

import slimfx

CALLS = ("open", "os.rename", "os.chmod", "os.remove")
"""By which a save reaches the folder: each opening, for writing and for the flushes, among them."""


def killed(path: Path, count: int) -> None:
    """Save, and die at one of `CALLS`, after so many others."""
    left = count

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in CALLS and str(path.parent) in str(arguments[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    program = compressed("mlp", "slim")
    sys.addaudithook(watch)
    slimfx.save(program, path, verify=False)


def test_saves_are_atomic(tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    slimfx.save(compressed("mlp", "slim"), path, verify=False)
    new = path.read_bytes()
    old = b"what was there before"
    fork = multiprocessing.get_context("fork")
    deaths = 0
    for count in range(100):
        path.write_bytes(old)
        work = fork.Process(target=killed, args=(path, count))
        work.start()
        work.join(60)
        died = work.exitcode == -signal.SIGKILL
        assert died or work.exitcode == 0
        assert path.read_bytes() in ((old, new) if died else (new,))
        for left in tmp_path.iterdir():  # a process that is killed cannot clean up
            assert left == path or left.name.endswith(".part")
            if left != path:
                left.unlink()
        if not died:
            break
        deaths += 1
    assert deaths >= 4  # written, flushed, moved, and the folder flushed
