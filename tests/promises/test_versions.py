"""Promise 18: the least torch is one that has the mended loader, and it is said where to report."""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
MENDED = Version("2.10")


def test_versions() -> None:
    wanted = [Requirement(line) for line in requires("slimfx") or []]
    [needed] = (each for each in wanted if each.name == "torch" and each.marker is None)
    least = min(Version(s.version) for s in needed.specifier if s.operator in (">=", "=="))
    assert least >= MENDED
    assert Version(torch.__version__.split("+")[0]) in needed.specifier
    assert "privately" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
