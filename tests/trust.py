"""How many things of a kind the tests tried and how many held; `make trust` prints the table."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRIED: Counter[str] = Counter()
HELD: Counter[str] = Counter()


@contextmanager
def trying(what: str) -> Iterator[None]:
    """Count a try, and that it held if the block ends without an error."""
    TRIED[what] += 1
    yield
    HELD[what] += 1


@contextmanager
def bounded(*, seconds: float = 5, memory: int = 512 << 20) -> Iterator[None]:
    """The block gets so much more address space and no more, and must end within the time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    began = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - began < seconds
