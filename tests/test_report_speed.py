"""The speed on the page: linears that a kernel takes, each beside floats; what is slower."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from models import compressed
from slimfx.runtime.inductor.direct import Sizes
from slimfx.runtime.targets import pt2
from typer.testing import CliRunner

from slimfx import report_speed
from slimfx.cli import app
from slimfx.report import Report, report
from slimfx.report_kernels import linears_of
from slimfx.report_page import page
from slimfx.report_speed import Speed, speeds_of

ROW = Speed(7, "4096 x 11008", "2:4 4 bits", 409, 250.0, 1000.0, 4.0, 0.5)


@pytest.mark.parametrize("recipe", ["slim-q", "slim"])
def test_every_linear_of_a_kernel_is_timed(recipe: str) -> None:
    linears = linears_of(compressed("mlp", recipe))
    rows = speeds_of(linears)
    assert sum(row.linears for row in rows) == len(linears) > 0
    shapes = {f"{linear.N} x {int(linear.matrices()[0][1])}" for linear in linears.values()}
    assert {row.shape for row in rows} == shapes
    for row in rows:
        assert row.microseconds > 0 and row.share > 0
        assert math.isclose(row.speedup, row.in_floats / row.microseconds)
        assert row.note.startswith("slower than torch.float32") == (row.speedup < 1)


def test_linears_without_a_kernel_are_left_out() -> None:
    linears = linears_of(compressed("mlp", "wanda"))  # in groups of 8 inputs
    assert linears and speeds_of(linears) == ()


def test_a_linear_that_is_slower_than_floats_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = linears_of(compressed("mlp", "slim-q"))

    def taken(sizes: list[Sizes]) -> dict[Sizes, float]:
        return {each: 2e-6 if each.forms[0].where == "floats" else 8e-6 for each in sizes}

    monkeypatch.setattr(report_speed, "measured", taken)
    monkeypatch.setattr(report_speed, "read_speed", lambda: 10.0)
    for row in speeds_of(linears):
        assert (row.microseconds, row.in_floats, row.speedup) == (8.0, 2.0, 0.25)
        assert row.note.startswith("slower than torch.float32")
        N, K = map(int, row.shape.split(" x "))
        assert row.share * 80_000 > N * K * 3 / 8  # bytes of 2:4 int4 alone, of those 10 GB/s read


def of(name: str, *speeds: Speed, seen: Report) -> Report:
    return dataclasses.replace(seen, name=name, speeds=speeds)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("speed") / "small.pt2"
    pt2.save(compressed("mlp", "slim-q"), path)
    return report(path)


def test_the_page_sums_up_what_was_timed(seen: Report) -> None:
    html = page([of("small.pt2", ROW, dataclasses.replace(ROW, linears=1), seen=seen)])
    assert "take 2 ms for a row, 8 ms in floats: 4.0 times" in html
    assert "4096 x 11008" in html and "50.0%" in html and "1,000.0" in html


def test_of_two_files_each_has_its_speed(seen: Report) -> None:
    fast = dataclasses.replace(ROW, linears=1, microseconds=125.0, speedup=8.0)
    html = page([of("a.pt2", ROW, seen=seen), of("b.pt2", fast, seen=seen)])
    assert "One row of x, one linear, A" in html and "One row of x, one linear, B" in html
    assert "b.pt2: all its linears together take 0.125 ms" in html


def test_what_was_not_timed_has_no_section(seen: Report) -> None:
    assert seen.speeds == () and "Speed on this CPU" not in page([seen])


def test_the_command_times_when_asked(tmp_path: Path) -> None:
    pt2.save(compressed("mlp", "slim-q"), tmp_path / "small.pt2")
    with torch.no_grad():
        line = ["report", str(tmp_path / "small.pt2"), "--time", "-o", str(tmp_path / "r.html")]
        done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "Speed on this CPU" in (tmp_path / "r.html").read_text(encoding="utf-8")
