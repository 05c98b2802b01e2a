"""`slimfx bench kernels`: sane rows, right products, and what is missing or wrong is said."""

import dataclasses
import json
import math
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from slimfx import bench_contenders, bench_kernels, cli_bench
from slimfx.bench_check import sample
from slimfx.bench_contenders import FLOAT, OURS, Shape, contenders
from slimfx.bench_kernels import KernelRow
from slimfx.cli import app
from slimfx.cli_bench_kernels import _draw, kernels_table
from slimfx.errors import SlimError

SHAPE = Shape(256, 48)
BARE, ADAPTED, BARE_8, ADAPTED_8 = OURS
LIMITS = {
    **{"bfloat16": 0.02, "aten int4": 0.02, "ort int4 a8": 0.06},
    **{BARE_8: 0.06, ADAPTED_8: 0.06},
}
"""Largest errors, in standard deviations; seen 0.0072, 0.0072 and 0.022, others below 1e-6."""


def test_copies_are_larger_than_the_caches_that_linux_names(tmp_path: Path) -> None:
    for i, size in enumerate(("48K", "2048K", "266240K")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    assert bench_kernels.largest_cache(tmp_path) == 266240 << 10
    assert bench_kernels.largest_cache(tmp_path / "none") == 0
    assert bench_kernels.COPIES >= max(200_000_000, 2 * bench_kernels.largest_cache())


@pytest.fixture(scope="module")
def rows() -> list[KernelRow]:
    told: list[tuple[float, str]] = []
    found = bench_kernels.bench_kernels(
        [SHAPE], (1, 3), copies=60_000, seconds=0.01, progress=lambda *at: told.append(at)
    )
    listed = list(found)
    assert told == [(0.0, "256x48 M=1"), (0.5, "256x48 M=3")]
    return listed


def test_every_contender_has_a_sane_row_for_every_M(rows: list[KernelRow]) -> None:
    names = ["float32", "bfloat16", "aten int4", "ort int4", "ort int4 a8", *OURS]
    for M in (1, 3):
        here = {row.name: row for row in rows if row.M == M}
        assert sorted(here) == sorted(names)
        base = here[FLOAT].seconds
        for row in here.values():
            assert row.shape == "256x48"
            if row.note:
                assert (row.note, row.seconds) == (_ort_note(), None)
                continue
            _assert_sane(row, base)


def _ort_note() -> str:
    return "onnx and onnxruntime not installed"


def _assert_sane(row: KernelRow, base: float | None) -> None:
    assert row.seconds and row.fastest and row.bytes and row.ceiling and base
    assert 0 < row.fastest <= row.seconds
    assert row.spread is not None and row.spread >= 0
    assert row.speedup == base / row.seconds
    assert row.gb_per_second == row.bytes / row.seconds / 1e9
    assert row.share == row.gb_per_second / row.ceiling
    assert row.error is not None and row.error < LIMITS.get(row.name, 2e-6)


def test_bytes_are_those_of_the_formats(rows: list[KernelRow]) -> None:
    size = {row.name: row.bytes for row in rows}
    K, N, tiles = 256, 48, 3
    assert size["float32"] == 4 * K * N
    assert size["aten int4"] == K * N // 2 + 4 * N * K // 128
    pairs = K * N * 3 // 8
    assert size[BARE] == pairs + 2 * 16 * tiles
    assert size[ADAPTED] == size[BARE] + (16 * K + N * 16) // 2 + 2 * (16 * 2 + 16 * tiles)


def test_what_the_checks_compare_with_is_what_the_op_defines() -> None:
    found, _ = contenders(SHAPE, copies=1)
    x = torch.randn(5, SHAPE.K, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = {contender.name: contender.exact(x.double()) for contender in found}
    assert all(y.shape == (5, 48) for y in exact.values())
    for name, y in exact.items():
        alike = name in (FLOAT, "bfloat16", "aten int4", "ort int4", "ort int4 a8")
        assert torch.equal(y, exact[FLOAT]) == alike
    assert torch.equal(exact[BARE], exact[BARE_8])
    assert torch.equal(exact[ADAPTED], exact[ADAPTED_8])
    assert 0.2 < (exact[ADAPTED] - exact[BARE]).std() / exact[BARE].std() < 5


def test_copies_are_distinct_and_as_large_as_asked() -> None:
    size, sets = bench_contenders._copied([torch.ones(100), torch.ones(50)], 2_000)
    assert (size, len(sets)) == (600, 4)
    assert len({tensor.data_ptr() for copy in sets for tensor in copy}) == 8


def test_a_sample_has_the_first_and_the_last_output() -> None:
    assert sample(48).tolist() == list(range(48))
    assert len(set(sample(11008).tolist())) == 256
    assert sample(11008)[[0, -1]].tolist() == [0, 11007]


def test_a_wrong_product_is_never_timed() -> None:
    found, _ = contenders(SHAPE, copies=1)
    x = torch.randn(3, SHAPE.K).bfloat16()
    right = found[0].bind(x.float())[0]()
    bench_kernels._checked(found[0], SHAPE, x, right)
    for at in ((0, 0), (2, 47)):
        for value in (right[at] + 0.1, math.nan):
            wrong = right.clone()
            wrong[at] = value
            with pytest.raises(SlimError, match="float32 on 256x48, M=3: its product is"):
                bench_kernels._checked(found[0], SHAPE, x, wrong)


def test_a_missing_package_is_a_stated_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_contenders, "find_spec", lambda name: None)
    found, notes = contenders(SHAPE, copies=1)
    assert [c.name for c in found] == ["float32", "bfloat16", "aten int4", *OURS]
    assert notes == dict.fromkeys(("ort int4", "ort int4 a8"), _ort_note())
    shown = [_row("ort int4", seconds=None, note=_ort_note())]
    table = kernels_table([*(_row(name) for name in (FLOAT, *OURS)), *shown])
    assert "-" in list(table.columns[7].cells)
    assert f"ort int4: {_ort_note()}." in str(table.caption)


def _row(name: str, **changes: Any) -> KernelRow:
    row = KernelRow("256x48", 1, name, *(0.002, 0.0001, 0.001, 1.5, 48, 20.0, 0.5, 40.0, 0.0))
    return dataclasses.replace(row, **changes)


def test_rows_survive_json_a_table_and_a_plot(rows: list[KernelRow], tmp_path: Path) -> None:
    read = json.loads(cli_bench.record(cli_bench.collect(rows, tmp_path / "rows.json")))
    assert [KernelRow(**row) for row in read["rows"]] == rows
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8")) == read
    table = kernels_table(rows)
    assert table.row_count == 2
    assert [column.header for column in table.columns][:3] == ["KxN", "M", FLOAT]
    _draw(rows, tmp_path / "plot.svg")
    assert "256x48" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_a_table_of_all_contenders_fits_80_columns(rows: list[KernelRow]) -> None:
    names = dict.fromkeys(row.name for row in rows)
    shape = {"shape": "4096x11008", "M": 512, "gb_per_second": 23.45, "share": 0.87}
    wide = [_row(n, seconds=0.1234, fastest=0.1, speedup=12.34, **shape) for n in names]
    console = Console(width=80, record=True, file=StringIO())
    console.print(kernels_table(wide))
    text = console.export_text()
    counts = [text.count(part) for part in ("123", "12.3x", "23.4", "87%")]
    assert counts == [len(names), len(names) - 1, 4, 4]


def test_the_command_prints_writes_and_draws(
    rows: list[KernelRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measured(*given: Any, progress: Any) -> Iterator[KernelRow]:
        asked.extend(given)
        progress(0.5, "256x48")
        yield from rows

    monkeypatch.setattr(bench_kernels, "bench_kernels", measured)
    options = ["bench", "kernels", "--shapes", "256x48", "--rows", "3,1,3"]
    threads = str(torch.get_num_threads())
    written = ["-o", str(tmp_path / "k.json"), "--plot", str(tmp_path / "k.png")]
    done = CliRunner().invoke(app, [*options, "--json", "--threads", threads, *written])
    assert done.exit_code == 0
    assert asked == [[SHAPE], [3, 1]]
    assert json.loads(done.stdout) == json.loads((tmp_path / "k.json").read_text(encoding="utf-8"))
    assert (tmp_path / "k.png").stat().st_size > 1000
    table = CliRunner().invoke(app, options, env={"COLUMNS": "80"}).stdout
    assert all(name in table for name in ("float32", "bfloat16", "lora", "256x48"))
    assert "\u2026" not in table


@pytest.mark.parametrize("text", ["0", "1,,2", "-1", "few"])
def test_other_rows_are_refused(text: str) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", "--shapes", "256x48", "--rows", text])
    assert isinstance(done.exception, SlimError)
    assert "whole numbers" in str(done.exception)


def test_shapes_are_models_and_products() -> None:
    both = bench_kernels.shapes("llama-2-7b,128x16,4096x4096")
    assert both == [Shape(4096, 4096), Shape(4096, 11008), Shape(11008, 4096), Shape(128, 16)]
    assert [shape.rank for shape in both] == [409, 409, 409, 1]
    every = bench_kernels.shapes(",".join(bench_kernels.MODELS))
    assert bench_kernels.shapes(",".join(map(str, every))) == every


@pytest.mark.parametrize("text", ["", "4096", "0x16", "llama-9", "4096x-1", "100x16", "128x10"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(SlimError, match="shape"):
        bench_kernels.shapes(text)
