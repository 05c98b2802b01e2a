"""The page of `slimfx report`: one file of HTML that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from slimfx.report import LAYER_COLUMNS, Report
from slimfx.report_layers import WORDS, compared_table, kinds_table, layers_plot, lowest
from slimfx.report_plots import Plot
from slimfx.report_speed import Speeds
from slimfx.tables import Table, environment, shown, table
from slimfx.tasks import TaskScore


@dataclass(frozen=True)
class Section:
    """A heading with what is under it."""

    heading: str
    words: tuple[str, ...]
    tables: Sequence[Table]
    plot: Plot | None = None
    tiles: tuple[tuple[str, str, str], ...] = ()
    """(figure, value, what it is beside)."""
    folded: bool = False
    """The tables are shown when they are asked for."""
    sortable: bool = True


def page(reports: Sequence[Report], dense: Report | None = None) -> str:
    """One artifact, or two side by side, as HTML; what comes from the files is escaped.

    Args:
        dense: of the model before compression, beside them.
    """
    named = dict(zip(("A", "B"), reports)) if len(reports) > 1 else {"": reports[0]}
    style, script = _asset("page.css"), _asset("page.js")
    title = " beside ".join(f"{mark}: {r.name}" if mark else r.name for mark, r in named.items())
    html = (
        environment()
        .get_template("page.html")
        .render(
            title=f"{title}, compressed by slimfx",
            lead="What it stores, what that cost, what runs it. This page needs no network.",
            sections=[
                _glance(named, dense),
                *(make(named) for make in (_bytes, _layers, _kernels)),
                *_speed(named),
                *(make(named) for make in (_weights, _making)),
            ],
            style=Markup(style),
            script=Markup(script),
            style_hash=_digest(style),
            script_hash=_digest(script),
        )
    )
    return html.encode(errors="xmlcharrefreplace").decode()  # a file may name half a surrogate pair


_Figure = tuple[Callable[[Report], Any], str]
_RATIOS = ("bytes", "bits a compressed weight", "perplexity")
_FIGURES: Mapping[str, _Figure] = {
    "bytes": (lambda r: r.bytes, ",d"),
    "bits a compressed weight": (lambda r: r.bits_per_weight, ".3f"),
    "compressed linears": (lambda r: len(r.manifest.layers) or None, "d"),
    "linears left as they are": (lambda r: len(r.manifest.skipped) or None, "d"),
    "signal to noise, median of the layers, dB": (lambda r: r.snr, ".2f"),
    "signal to noise, lowest, dB": (lambda r: lowest(r.manifest.layers), ".2f"),
    "perplexity": (lambda r: _measured(r, "perplexity"), ",.2f"),
    "cosine to the dense model's embeddings": (lambda r: _measured(r, "cosine"), ".4f"),
    "tokens it was measured on": (lambda r: r.quality.tokens if r.quality else None, ",d"),
    "recorded inputs, asked again here": (lambda r: _golden(r), ""),
}


def _glance(named: Mapping[str, Report], dense: Report | None) -> Section:
    """One artifact as tiles, with the dense model in small; two as a table."""
    both = {mark or "artifact": report for mark, report in named.items()}
    if dense is not None:
        both["dense"] = dense
    names, rows = list(both), []
    for figure, (of, spec) in {**_FIGURES, **_tasks(both.values())}.items():
        values = [of(report) for report in both.values()]
        values = [None if value != value or value == "" else value for value in values]
        if any(value is not None for value in values):
            ratio = _ratio(*values[:2]) if figure in _RATIOS else ""
            rows.append((figure, [shown(value, spec) for value in values], ratio))
    if len(named) == 1:
        tiles = tuple(
            (figure, cells[0], f"{cells[1]} dense" if cells[1:] and cells[1] else "")
            for figure, cells, _ in rows
        )
        return Section("At a glance", (), (), tiles=tiles)
    columns = {"figure": "", **dict.fromkeys(names, ""), "B / A": ""}
    cells = [[figure, *values, ratio] for figure, values, ratio in rows]
    return Section(
        "At a glance", (), (Table("Figures of the whole", columns, cells),), sortable=False
    )


def _measured(report: Report, metric: str) -> float | None:
    return report.quality.value if report.quality and report.quality.metric == metric else None


def _tasks(reports: Iterable[Report]) -> dict[str, _Figure]:
    """A figure for each metric of each task, with its standard error and what was cut."""

    def named(score: TaskScore) -> str:
        return f"{score.task}, {score.metric}, {score.samples} documents"

    def of(report: Report, name: str) -> str | None:
        score = {named(each): each for each in report.scores}.get(name)
        if score is None:
            return None
        error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
        return f"{score.value:.3f}{error}" + (f" ({score.cut} cut)" if score.cut else "")

    names = dict.fromkeys(named(score) for report in reports for score in report.scores)
    return {name: (partial(of, name=name), "") for name in names}


def _ratio(first: Any, second: Any = None) -> str:
    """How many times the first the second is, where both are positive numbers."""
    if any(isinstance(value, str) or value is None or value <= 0 for value in (first, second)):
        return ""
    return f"{second / first:.3f}"


def _golden(report: Report) -> str:
    found = report.golden
    if isinstance(found, str):
        return found
    if found.identical:
        return "same answers to the bit"
    verdict = "same answers" if found.passed else "OTHER ANSWERS"
    return (
        f"{verdict}: they differ by {found.max_difference:.2g} of the largest output, the limit is "
        f"{found.tolerance:.2g}"
    )


def _bytes(named: Mapping[str, Report]) -> Section:
    if len(named) == 1:
        columns = {
            "what": ("name", ""),
            "bytes": ("bytes", ",d"),
            "of the file": ("share", "bar"),
            "bits a compressed weight": ("bits", ".4f"),
        }
        tables = [table("Bytes of the file", columns, r.parts) for r in named.values()]
    else:
        parts = [{part.name: part for part in report.parts} for report in named.values()]
        rows = []
        for name in dict.fromkeys(name for each in parts for name in each):
            found = [each.get(name) for each in parts]
            counts = [part.bytes if part else 0 for part in found]
            bits = [part.bits if part else None for part in found]
            rows.append([name, *counts, counts[1] - counts[0], *bits])
        columns_of_two = {
            **{"what": "", "bytes, A": ",d", "bytes, B": ",d", "B - A": "+,d"},
            **{"bits a compressed weight, A": ".4f", "bits, B": ".4f"},
        }
        tables = [Table("Bytes of the files", columns_of_two, rows)]
    words = (
        "Codes are the values that stay, positions say where; adapters are counted with their own "
        "scales, and an embedding that is also the head with the linears."
    )
    return Section("Size by part", (words,), tuple(tables))


def _layers(named: Mapping[str, Report]) -> Section:
    layers = {mark: report.manifest.layers for mark, report in named.items()}
    tables = [
        kinds_table(_captioned("By kind of layer", mark), rows)
        for mark, rows in layers.items()
        if rows
    ]
    if len(named) > 1:
        tables.append(compared_table(layers))
    else:
        tables.append(table("Every compressed layer", LAYER_COLUMNS, layers[""]))
    return Section("Layers", WORDS, tables, layers_plot(layers))


def _kernels(named: Mapping[str, Report]) -> Section:
    columns = {
        "device": ("device", ""),
        "rows of x": ("rows", ""),
        "kernel": ("kernel", ""),
        "linears": ("linears", "d"),
        "why not those before it": ("why_not", ""),
        "stored as": ("stored", ""),
    }
    tables = _tables("Kernels by device", columns, {mark: r.kernels for mark, r in named.items()})
    words = (
        "Rows of x are the tokens of a call. Machine code for CPUs comes from export --to aoti or "
        "torch.compile, for GPUs from torch.compile.",
        *(
            f"{report.name} has no ops of slimfx: torch runs it, and unpacks the weights at each "
            f"call."
            for report in named.values()
            if not report.kernels
        ),
    )
    return Section("Kernels", words, tables)


def _speed(named: Mapping[str, Report]) -> list[Section]:
    """None where nothing was timed."""
    timed = {mark: r.speeds for mark, r in named.items() if r.speeds is not None}
    if not timed:
        return []
    columns = {
        "out x in": ("shape", ""),
        "linears": ("linears", "d"),
        "rank": ("rank", "d"),
        "microseconds": ("microseconds", ",.1f"),
        "in floats": ("in_floats", ",.1f"),
        "times as fast": ("speedup", ".2f"),
        "of the memory limit": ("share", "bar"),
        "notes": ("note", ""),
        "stored as": ("stored", ""),
    }
    rows = {mark: speeds.rows for mark, speeds in timed.items()}
    here = next(iter(timed.values()))  # the same machine for both
    words = (
        f"Measured on {here.cpu} with {here.threads} threads, each linear by itself, its weights "
        f"one after the other out of more than any cache holds; a compiled program also joins "
        f"those that read the same x. The memory limit is the fastest plain read, "
        f"{here.gb_per_second:.1f} GB/s.",
        *(f"{named[mark].name}: {_together(each)}" for mark, each in timed.items()),
    )
    return [Section("Speed on this CPU", words, _tables("One row of x, one linear", columns, rows))]


def _together(speeds: Speeds) -> str:
    """The sum over the linears, and how many it leaves out."""
    count = sum(row.linears for row in speeds.rows)
    left = f" No kernel takes {speeds.left} others; torch runs them." if speeds.left else ""
    if not count:
        return f"no compressed linear was timed.{left}"
    ours = sum(row.linears * row.microseconds for row in speeds.rows) / 1e3
    plain = sum(row.linears * row.in_floats for row in speeds.rows) / 1e3
    return (
        f"{count} linears, each run once for a row, take {ours:.3g} ms, {plain:.3g} ms in floats: "
        f"{plain / ours:.1f} times.{left}"
    )


def _weights(named: Mapping[str, Report]) -> Section:
    columns = {
        "weight": ("name", ""),
        "stored as": ("stored", ""),
        "out x in": ("shape", ""),
        "bytes": ("bytes", ",d"),
        "why, and what was out of the ordinary": ("why", ""),
    }
    tables = _tables("Every weight", columns, {mark: r.weights for mark, r in named.items()})
    return Section("Every weight", (), tables, folded=True)


def _making(named: Mapping[str, Report]) -> Section:
    """Recipe, calibration and versions, key by key."""
    found = [
        _flat(
            {
                "form": report.manifest.form,
                "recipe": report.manifest.recipe,
                "calibration": report.manifest.calibration,
                "version": report.manifest.versions,
            }
        )
        for report in named.values()
    ]
    columns = {"what": "", **{mark or "value": "" for mark in named}}
    rows = []
    for key in dict.fromkeys(key for each in found for key in each):
        values = [each.get(key, "") for each in found]
        differs = ["differs" if values[0] != values[-1] else ""] if len(values) > 1 else []
        rows.append([key, *values, *differs])
    if len(named) > 1:
        columns["A and B"] = ""
    caption = "Recipe, calibration data and versions"
    return Section("How it was made", (), (Table(caption, columns, rows),), sortable=False)


def _flat(value: Any) -> dict[str, str]:
    """Nested mappings and lists as one, with dotted keys; a hostile file may nest them deeply."""
    found, left = {}, [("", value)]
    while left:
        key, value = left.pop()
        if value and isinstance(value, Mapping | list | tuple):
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            left += reversed([(f"{key}.{name}".lstrip("."), each) for name, each in inner])
        else:
            found[key] = "none" if value is None else str(value)
    return found


def _tables(
    caption: str, columns: Mapping[str, tuple[str, str]], rows: Mapping[str, Sequence[Any]]
) -> list[Table]:
    """One for each artifact that has rows."""
    return [table(_captioned(caption, m), columns, each) for m, each in rows.items() if each]


def _captioned(caption: str, mark: str) -> str:
    return f"{caption}, {mark}" if mark else caption


def _asset(name: str) -> str:
    return (files("slimfx") / "pages" / name).read_text(encoding="utf-8").strip()


def _digest(text: str) -> str:
    """What a browser compares an inline style or script with."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
