"""What the commands print: sizes and figures as people and programs read them."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from slimfx import show


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (99_999, "99,999 B"),
        (100_000, "0.100 MB"),
        (1_234_567, "1.235 MB"),
        (7_000_000_000, "7,000.000 MB"),
    ],
)
def test_bytes_are_shown_as_people_read_them(count: int, text: str) -> None:
    assert show.size(count) == text


def test_figures_are_a_table_with_units_where_the_name_says_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show.values({"file_bytes": 1_234_567, "peak_memory": 12, "snr": 3.14159, "form": "op"}, False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["file", "bytes", "1.235", "MB"],
        ["peak", "memory", "12", "B"],
        ["snr", "3.142"],
        ["form", "op"],
    ]


def test_figures_are_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"file_bytes": 1_234_567, "snr": 3.14159, "form": "op"}
    show.values(figures, True)
    assert json.loads(capsys.readouterr().out) == figures


def test_names_of_layers_are_whole_on_a_narrow_screen() -> None:
    name = "model.model.layers.0.self_attn.q_proj"
    table = show.layer_table([name, "x"], "layout", "bytes")
    table.add_row(name, "2:4 int4", "1,234 B")
    console = Console(width=60)
    with console.capture() as captured:
        console.print(table)
    assert name in captured.get()
    assert show.layer_table([], "layout").columns[0].min_width == 0


def test_the_progress_line_goes_to_standard_error_and_takes_every_call(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with show.line("compress") as tell:
        for share in (0.0, 0.5, 1.0):
            tell(share, "layers.0")
    assert capsys.readouterr().out == ""
