"""Every program of examples/reproduce runs on a sliver of the demo model and draws its picture."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPRODUCE = ROOT / "examples" / "reproduce"
DEMO = str(ROOT / "examples" / "demo_lm")
SLIVER = ("--samples", "1", "--calibration-samples", "2", "--length", "64")
RUNS: dict[str, tuple[Sequence[str], int]] = {
    "cost": ((DEMO, "--presets", "slim,slim-q"), 2),
    "rank": ((DEMO, *SLIVER, "--presets", "slim", "--ranks", "0,0.1"), 3),
    "sparsity": ((DEMO, *SLIVER, "--presets", "wanda", "--sparsities", "0.3,0.6"), 3),
    "two_bits": ((DEMO, *SLIVER, "--presets", "slim-q"), 5),
    "accuracy": ((DEMO, *SLIVER, "--presets", "wanda,slim", "--inputs", "fp8"), 5),
    "calibration": ((DEMO, *SLIVER, "--presets", "slim-q", "--counts", "1,2"), 4),
    "pareto": ((DEMO, *SLIVER, "--presets", "absmax"), 2),
    "compression_time": (("--sizes", "64", "--presets", "wanda,joint"), 7),
    "groups": (("--size", "128", "--layers", "2", "--groups", "0,32", "--rows", "1"), 2),
}
"""Program -> its arguments, and how many rows they make."""
QUICK = ("cost", "compression_time")


def test_every_program_is_run() -> None:
    assert set(RUNS) == {path.stem for path in REPRODUCE.glob("*.py")} - {"study"}
    told = re.findall(r"`(\w+)\.py`", (REPRODUCE / "README.md").read_text(encoding="utf-8"))
    assert set(told) == {*RUNS, "study"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_it_measures_and_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPRODUCE)
    words, count = RUNS[name]
    rows = importlib.import_module(name).main([*words, "-o", str(tmp_path / "picture.png")])
    assert len(rows) == count
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "picture.json").read_text())["rows"]) == count


@pytest.mark.slow
def test_more_is_lost_the_more_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPRODUCE)
    dense, low, high = importlib.import_module("sparsity").main(RUNS["sparsity"][0])
    assert dense.quality < low.quality < high.quality
    assert high.bits_per_weight < low.bits_per_weight
