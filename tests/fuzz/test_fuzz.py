"""A short fuzz of every reader: good inputs with bytes changed, moved, cut out and doubled."""

from __future__ import annotations

import random

import pytest
from targets import TARGETS, seeds, tried
from trust import trying

RUNS = {"loader": 1_500, "graph": 500, "recipe": 500, "manifest": 5_000}
TOKENS = (
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"null",
    b"-1",
    b"1e999",
    b"&a",
    b"*a",
    b"!!",
    b"\0",
    b"\xff",
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes of a kind that readers stumble over."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place, end = draw.randrange(len(found) + 1), draw.randrange(len(found) + 1)
        kind = draw.randrange(5)
        if kind == 0 and place < len(found):
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[place:place] = draw.choice(TOKENS)
        elif kind == 2:
            del found[place : place + draw.randint(1, 16)]
        elif kind == 3:
            found[place:place] = found[end : end + draw.randint(1, 32)]
        elif place < len(found):
            found[place] = draw.randrange(256)
    return bytes(found)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_bytes_are_taken_or_refused(name: str) -> None:
    taken = 0
    for seed in range(RUNS[name]):
        draw = random.Random(seed)
        with trying("fuzz executions"):
            taken += tried(name, mutated(draw.choice(seeds(name)), draw))
    assert taken < RUNS[name]
    assert all(tried(name, good) for good in seeds(name))
