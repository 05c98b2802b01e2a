"""The speed on the page: linears that a kernel takes, each beside floats; what is slower."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models import captured, case, compressed
from slimfx.runtime.inductor import direct
from slimfx.runtime.inductor.direct import Sizes
from slimfx.runtime.targets import pt2
from torch._inductor import config as inductor_config
from torch.export import ExportedProgram
from typer.testing import CliRunner

import slimfx
from slimfx import report_speed
from slimfx.cli import app
from slimfx.errors import ArtifactError, SlimError
from slimfx.recipe import Prune, Quantize, Recipe
from slimfx.report import Report, report
from slimfx.report_kernels import linears_of
from slimfx.report_page import page
from slimfx.report_speed import Speed, Speeds, speeds_of

ROW = Speed(7, "4096 x 11008", "2:4 values of 4 bits", 409, 250.0, 1000.0, 0.5)
SPEEDS = Speeds("A processor", 2, 20.0, (ROW, dataclasses.replace(ROW, linears=1)), 0)


@pytest.mark.parametrize("recipe", ["slim-q", "slim", "50%"])
def test_every_linear_of_a_kernel_is_timed(recipe: str) -> None:
    linears = linears_of(compressed("mlp", recipe))
    found = speeds_of(linears)
    assert sum(row.linears for row in found.rows) + found.left == len(linears) > 0
    assert (found.left == 0) == (recipe != "50%")  # which has groups of 12
    for row in found.rows:
        assert row.microseconds > 0 and row.share > 0


def test_what_is_stored_is_said_and_not_what_the_kernel_reads() -> None:
    recipe = Recipe(prune=None, quantize=Quantize("absmax", bits=3), adapter=None)
    program = slimfx.compress(captured("mlp"), recipe, case("mlp").batches)
    assert all(row.stored.startswith("dense values of 3 bits") for row in timed(program).rows)
    halves = Recipe(prune=Prune("wanda", sparsity=0.5), quantize=Quantize("absmax"), adapter=None)
    rows = timed(slimfx.compress(captured("mlp"), halves, case("mlp").batches)).rows
    assert rows and all("timed as if half of the values stayed" in row.note for row in rows)


def timed(program: ExportedProgram) -> Speeds:
    return speeds_of(linears_of(program))


def test_linears_without_a_kernel_are_left_out_and_counted(tmp_path: Path) -> None:
    linears = linears_of(compressed("mlp", "wanda"))  # in groups of 8 inputs
    found = speeds_of(linears)
    assert found.rows == () and found.left == len(linears) > 0
    pt2.save(compressed("mlp", "wanda"), tmp_path / "small.pt2")
    html = page([report(tmp_path / "small.pt2", timed=True)])
    assert f"no compressed linear was timed. No kernel takes {found.left} others" in html
    pt2.save(compressed("mlp", "slim-q"), tmp_path / "aten.pt2", form="aten")
    html = page([report(tmp_path / "aten.pt2", timed=True)])
    assert "no compressed linear was timed." in html and "No kernel takes" not in html


def test_a_linear_that_is_slower_than_floats_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = linears_of(compressed("mlp", "slim-q"))

    def taken(sizes: list[Sizes]) -> dict[Sizes, float]:
        return {each: 2e-6 if each.forms[0].where == "floats" else 8e-6 for each in sizes}

    monkeypatch.setattr(report_speed, "measured", taken)
    monkeypatch.setattr(report_speed, "read_speed", lambda: 10.0)
    found = speeds_of(linears)
    assert found.gb_per_second == 10 and found.threads == torch.get_num_threads()
    for row in found.rows:
        assert (row.microseconds, row.in_floats, row.speedup) == (8.0, 2.0, 0.25)
        N, K = map(int, row.shape.split(" x "))
        assert row.share * 80_000 > N * K * 3 / 8  # bytes of 2:4 int4 alone, of those 10 GB/s read
    notes = " ".join(row.note for row in found.rows)
    assert all(name in notes for name in linears) and "slower than floats for one row" in notes


def test_a_matrix_of_no_groups_is_refused() -> None:
    ((name, linear),) = list(linears_of(compressed("mlp", "50%")).items())[:1]
    broken = dataclasses.replace(linear, weight=dataclasses.replace(linear.weight, group=0))
    with pytest.raises(ArtifactError, match=f"{name}: .* is no matrix"):
        speeds_of({name: dataclasses.replace(broken, L=None, R=None)})


def test_without_a_compiler_the_step_is_named() -> None:
    linears = linears_of(compressed("mlp", "slim-q"))
    direct._compiled.cache_clear()
    with (
        inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(SlimError, match=r"kernels cannot be compiled \(.*install g\+\+"),
    ):
        speeds_of(linears)
    assert speeds_of(linears).left == 0  # nothing of it is remembered


def of(name: str, speeds: Speeds, seen: Report) -> Report:
    return dataclasses.replace(seen, name=name, speeds=speeds)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("speed") / "small.pt2"
    pt2.save(compressed("mlp", "slim-q"), path)
    return report(path)


def test_the_page_sums_up_what_was_timed(seen: Report) -> None:
    html = page([of("small.pt2", SPEEDS, seen)])
    assert "small.pt2: 8 linears, each run once for a row, take 2 ms, 8 ms in floats: 4.0" in html
    assert "4096 x 11008" in html and "50.0%" in html and "1,000.0" in html
    assert "A processor with 2 threads" in html and "20.0 GB/s" in html


def test_of_two_files_each_has_its_speed(seen: Report) -> None:
    fast = dataclasses.replace(ROW, linears=1, microseconds=125.0)
    other = dataclasses.replace(SPEEDS, rows=(fast,), left=2)
    html = page([of("a.pt2", SPEEDS, seen), of("b.pt2", other, seen)])
    assert "One row of x, one linear, A" in html and "One row of x, one linear, B" in html
    assert "b.pt2: 1 linears, each run once for a row, take 0.125 ms" in html
    assert "No kernel takes 2 others" in html


def test_what_was_not_timed_has_no_section(seen: Report) -> None:
    assert seen.speeds is None and "Speed on this CPU" not in page([seen])


def test_the_command_times_when_asked(tmp_path: Path) -> None:
    pt2.save(compressed("mlp", "slim-q"), tmp_path / "small.pt2")
    line = ["report", str(tmp_path / "small.pt2"), "--time", "-o", str(tmp_path / "r.html")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "Speed on this CPU" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--limit", "3"], "--limit is for --tasks"), (["--tasks", ","], "--tasks names none")],
)
def test_options_of_nothing_are_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["report", "small.pt2", *options])
    assert done.exit_code == 2 and message in done.output
