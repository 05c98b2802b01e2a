"""The versions of constraints.txt are those whose bytes constraints-hashed.txt names."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lines(name: str) -> list[str]:
    """Of a file, without comments and without an index's own suffix, such as +cpu."""
    found = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [re.sub(r"\+\w+", "", line) for line in found if line]


def test_every_version_is_pinned_by_its_bytes() -> None:
    hashed = lines("constraints-hashed.txt")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in hashed)
    named = {line.split()[0].lower() for line in hashed}
    assert named == {line.lower() for line in lines("constraints.txt")}  # else: make hashes
