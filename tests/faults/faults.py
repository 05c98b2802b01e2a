"""Faults at the calls by which Python reaches a folder, put in one at a time.

A fault point is an opening for writing, a write, a flush, a rename, a chmod, a new folder. At the
one that was asked for the process dies, half of the write done, or the call fails.
"""

from __future__ import annotations

import _io
import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAVED, THROUGH, DIED = "saved", "through", "died"
"""In spite of the fault; before there was one; of it."""


class Watched:
    """A file whose writes are fault points."""

    def __init__(self, file: Any, reach: Callable[..., None]) -> None:
        self._file, self._reach = file, reach

    def write(self, data: Any) -> Any:
        self._reach(lambda: self._file.write(data[: len(data) // 2]))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        self._file.__enter__()
        return self

    def __exit__(self, *given: Any) -> Any:
        return self._file.__exit__(*given)

    def __iter__(self) -> Any:
        return iter(self._file)


def put_in(folder: Path, point: int, fault: str) -> Callable[[], bool]:
    """Let this process meet `fault` ("kill", or the name of an errno) at one of its points.

    Returns whether it has.
    """
    left = point

    def reach(half: Callable[[], Any] = lambda: None) -> None:
        nonlocal left
        left -= 1
        if left != -1:
            return
        if fault == "kill":
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and str(path).startswith(str(folder))

    opened = _io.open

    def watched(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        writes = set(mode) & set("wax+")
        if writes and inside(file):
            reach()
        found = opened(file, mode, *given, **named)
        return Watched(found, reach) if writes and (inside(file) or named.get("opener")) else found

    builtins.open = io.open = _io.open = watched  # type: ignore[assignment]
    for name in ("replace", "rename", "chmod", "mkdir", "fsync"):
        setattr(os, name, _reaching(getattr(os, name), name, inside, reach))
    return lambda: left < 0


def _reaching(call: Any, name: str, inside: Callable[[Any], bool], reach: Any) -> Any:
    def reaching(*given: Any, **named: Any) -> Any:
        if name == "fsync" or inside(given[0]):
            reach()
        return call(*given, **named)

    return reaching


def meet(work: Callable[[], Any], folder: Path, point: int, fault: str) -> str:
    """What became of `work` in a process of its own: one of the above, or the error's class."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            met = put_in(folder, point, fault)
            work()
            said = SAVED if met() else THROUGH
        except BaseException as error:  # noqa: BLE001  told to the parent
            said = type(error).__name__
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return DIED if killed else said
