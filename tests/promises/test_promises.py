"""Every promise of docs/promises.md has its test, and every test here its promise."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in TEXT.splitlines() if re.match(r"\| *\d", line)]


def test_every_promise_has_a_test_and_every_test_a_promise() -> None:
    named = {name for row in ROWS for name in re.findall(r"`(test_\w+\.py)`", row[2])}
    assert named == {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
    assert [int(row[0]) for row in ROWS] == list(range(1, 19))
    assert all(row[2].strip() or row[3].strip() for row in ROWS)


def test_what_is_named_is_there() -> None:
    for name in re.findall(r"`((?:tests|runtime)/[\w./]+)`", TEXT):
        assert (HERE.parents[1] / name).exists(), name
