"""The page: small, of itself alone, all texts escaped, with the report's figures."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import RECIPES, compressed
from slimfx.runtime.golden import CheckResult
from slimfx.runtime.manifest import LayerReport, Manifest
from slimfx.runtime.targets import pt2

from slimfx import tables
from slimfx.evaluate import Quality
from slimfx.report import Report, Weight, report
from slimfx.report_page import page
from slimfx.report_plots import snr_plot
from slimfx.tasks import TaskScore

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"' {{ 7 * 7 }}"
TEXT = st.text(st.characters(exclude_categories=()))
"""Surrogates, too: JSON can hold them."""
ATTRIBUTES = {
    *("lang", "charset", "name", "content", "http-equiv", "class", "role", "scope", "type", "id"),
    *("aria-label", "aria-labelledby", "aria-sort", "aria-hidden", "tabindex", "viewbox", "d"),
    *("width", "height", "x", "y", "cx", "cy", "r", "text-anchor", "preserveaspectratio"),
}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "main"),
    *("section", "dl", "div", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("button", "svg", "rect", "figure", "figcaption", "desc", "path", "text", "g", "circle"),
    *("span", "details", "summary", "script"),
}


class Parsed(HTMLParser):
    """Tags and attributes of a page, and its texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def layer(name: str, snr: float = 12.0) -> LayerReport:
    return LayerReport(
        *(name, 4096, 4096, "2:4 int4", 409, 7_700_000, 65_536, snr, snr - 4, 0.001),
        notes=("3 of 4096 inputs were never seen",),
    )


def of_layers(*layers: LayerReport, name: str = "small.pt2", golden: object = "") -> Report:
    weights = [Weight(row.name, row.layout, "4096 x 4096", row.bytes, "") for row in layers]
    manifest = Manifest(layers=layers, recipe={"a": {"b": [1, {"c": None}]}, "d": "e"})
    return Report(name, 10**9, manifest, (), tuple(weights), (), golden)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("page") / "small.pt2"
    pt2.save(compressed("mlp", "slim-q"), path)
    return report(path)


def test_the_page_holds_the_figures_of_the_report(real: Report) -> None:
    texts = Parsed(page([real])).texts
    assert f"{real.bytes:,}" in texts and f"{real.bits_per_weight:.3f}" in texts
    assert "same answers to the bit" in texts
    for part in real.parts:
        assert part.name in texts and f"{part.bytes:,}" in texts
    for row in real.manifest.layers:
        assert row.name in texts and f"{row.snr:.1f}" in texts
    for weight in real.weights:
        assert weight.name in texts
    for kernel in real.kernels:
        assert kernel.kernel in texts and kernel.rows in texts
    assert "recipe.prune.method" in texts and real.manifest.versions["torch"] in texts
    assert real.manifest.calibration["sha256"] in texts


def test_the_page_uses_nothing_but_itself(real: Report) -> None:
    html = page([real])
    found = Parsed(html)
    assert set(found.tags) <= TAGS
    assert {name for name, _ in found.attributes} <= ATTRIBUTES  # no src, no href, no handlers
    assert re.search(r"https?:|url\(|@import|fetch|XMLHttp", html) is None


def test_the_policy_allows_this_style_and_this_script_alone(real: Report) -> None:
    html = page([real])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def test_what_a_file_says_never_becomes_markup() -> None:
    row = dataclasses.replace(layer(HOSTILE), layout=HOSTILE, notes=(HOSTILE,))
    manifest = Manifest(
        form=HOSTILE,
        layers=(row,),
        recipe={HOSTILE: HOSTILE},
        skipped={HOSTILE: HOSTILE},
        calibration={"sha256": HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    weights = (Weight(HOSTILE, HOSTILE, "1 x 1", 1, HOSTILE),)
    hostile = Report(HOSTILE, 1, manifest, (), weights, (), HOSTILE)
    for html in (page([hostile]), page([hostile, hostile], hostile), hostile._repr_html_()):
        found = Parsed(html)
        assert set(found.tags) <= TAGS and {name for name, _ in found.attributes} <= ATTRIBUTES
        assert found.tags.count("script") == (0 if "<main>" not in html else 1)
        assert HOSTILE in "\0".join(found.texts)  # shown as it is: 49 stands nowhere for 7 * 7


@given(name=TEXT, note=TEXT, snr=st.floats(), clipped=st.floats())
@settings(max_examples=30, deadline=None)
def test_any_text_and_number_makes_a_page(name: str, note: str, snr: float, clipped: float) -> None:
    row = dataclasses.replace(layer(name, snr), notes=(note,), clipped=clipped)
    for html in (page([of_layers(row)]), page([of_layers(row), of_layers(layer("b"))])):
        found = Parsed(html)
        assert set(found.tags) <= TAGS and found.tags.count("script") == 1 and html.encode()
        assert not {"nan", "inf"} & set(re.findall(r'c[xy]="([^"]*)"', html))


def test_a_deeply_nested_recipe_makes_a_page() -> None:
    nested: object = "end"
    for _ in range(5000):
        nested = [nested]
    found = dataclasses.replace(of_layers(layer("a")), manifest=Manifest(recipe={"x": nested}))
    assert "end" in Parsed(page([found])).texts


def test_a_model_of_32_blocks_stays_below_2_megabytes() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rows = [
        layer(f"model.model.layers.{i}.{'mlp' if j > 3 else 'self_attn'}.{name}", 10 + math.sin(i))
        for i in range(32)
        for j, name in enumerate(names)
    ]
    assert len(rows) == 224
    one = of_layers(*rows)
    norms = [
        Weight(f"model.layers.{i}.norm.weight", "bfloat16", "4096", 8192, "no weight of a linear")
        for i in range(65)
    ]
    one = dataclasses.replace(one, weights=(*one.weights, *norms))
    assert 50_000 < len(page([one]).encode()) < 500_000
    assert len(page([one, one]).encode()) < 2_000_000


def test_two_artifacts_are_side_by_side() -> None:
    a = of_layers(layer("x", 10.0), layer("only.a", 9.0), name="a.pt2")
    b = of_layers(layer("x", 12.5), layer("only.b", 8.0), name="b.pt2")
    b = dataclasses.replace(
        b, bytes=5 * 10**8, manifest=dataclasses.replace(b.manifest, recipe={"d": "f"})
    )
    html = page([a, b])
    texts = Parsed(html).texts
    assert "A: a.pt2 beside B: b.pt2, compressed by slimfx" in texts
    assert "+2.5" in texts and "0.500" in texts and "differs" in texts
    row = re.search(r'<tr><th scope="row">only.a</th>(.*?)</tr>', html, re.S)
    assert row is not None and row[1].startswith('<td class="n">9.0</td><td class="n"></td>')


def test_the_dense_model_stands_beside() -> None:
    a, dense = of_layers(layer("x")), Report("dense", 4 * 10**9, Manifest(), (), (), (), "")
    a = dataclasses.replace(a, quality=Quality("perplexity", 7.123, 2, 1022))
    dense = dataclasses.replace(dense, quality=Quality("perplexity", 6.789, 2, 1022))
    texts = Parsed(page([a], dense)).texts
    assert {"7.12", "6.79 dense", "4,000,000,000 dense", "1,022"} <= set(texts)
    texts = Parsed(page([a, a], dense)).texts
    assert {"7.12", "6.79", "dense"} <= set(texts)


def test_scores_and_cosine_stand_at_the_top() -> None:
    score = TaskScore("piqa", "acc", 0.75, 0.0123, 400, 3)
    a = of_layers(layer("x"))
    a = dataclasses.replace(a, scores=(score,), quality=Quality("cosine", 0.97654, 8, 96))
    better = dataclasses.replace(score, value=0.8, stderr=None, cut=0)
    other = dataclasses.replace(better, task="mmlu")
    dense = Report("dense", 10, Manifest(), (), (), (), "", scores=(better, other))
    texts = Parsed(page([a], dense)).texts
    assert {"piqa, acc, 400 documents", "0.750 ± 0.012 (3 cut)"} <= set(texts)
    assert {"mmlu, acc, 400 documents", "0.800 dense"} <= set(texts)
    assert "0.9765" in texts and "perplexity" not in texts


@pytest.mark.parametrize(
    ("golden", "text"),
    [
        (CheckResult(True, 0.0, 1e-4), "same answers to the bit"),
        (CheckResult(False, 2e-6, 1e-4), "same answers: they differ by 2e-06 of the largest"),
        (CheckResult(False, 0.5, 1e-4), "OTHER ANSWERS: they differ by 0.5 of the largest"),
        ("carries no golden outputs", "carries no golden outputs"),
    ],
)
def test_the_check_is_in_words(golden: CheckResult | str, text: str) -> None:
    assert any(text in each for each in Parsed(page([of_layers(golden=golden)])).texts)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_page(tmp_path: Path, recipe: str) -> None:
    pt2.save(compressed("mlp", recipe), tmp_path / "small.pt2")
    assert Parsed(page([report(tmp_path / "small.pt2")])).tags.count("section") == 6


def test_the_plot_says_in_words_what_it_draws() -> None:
    found = snr_plot("SNR", {"with": {"a": 3.0, "b": 9.0}, "without": {"a": 1.0, "b": math.nan}})
    assert found is not None
    assert found.text == (
        "With: from 3.0 dB (a) to 9.0 dB (b), median 6.0 dB. "
        "Without: from 1.0 dB (a) to 1.0 dB (a), median 1.0 dB."
    )
    assert [len(dots) for dots in found.dots] == [2, 1]
    assert [label for _, label in found.ticks] == ["0", "2", "4", "6", "8", "10"]
    heights = [y for y, _ in found.ticks]
    for x, y, _ in (dot for dots in found.dots for dot in dots):
        assert found.left < x < found.width and min(heights) <= y <= max(heights)
    assert found.dots[0][0][1] > found.dots[0][1][1]  # 9 dB is above 3 dB


def test_the_plot_keeps_scale() -> None:
    found = snr_plot("SNR", {"with": {"a": 0.0, "b": 5.0, "c": 10.0}})
    assert found is not None
    low, middle, high = (y for _, y, _ in found.dots[0])
    assert math.isclose(low - middle, middle - high, abs_tol=0.11)


@pytest.mark.parametrize("values", [{}, {"a": math.nan}, {"a": math.inf}, {"a": 1e300}])
def test_nothing_to_draw_is_no_plot(values: dict[str, float]) -> None:
    assert snr_plot("SNR", {"with": values}) is None


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (None, ",d", ""),
        ("x", ",d", "x"),
        (1234567, ",d", "1,234,567"),
        (math.nan, ".1f", "–"),
        (-math.inf, ".1f", "–"),
        (math.inf, ".1f", "∞"),
        (0.125, "bar", "12.5%"),
        (("a", "b"), "", "a; b"),
    ],
)
def test_cells_are_as_people_read_them(value: object, spec: str, text: str) -> None:
    assert tables.shown(value, spec) == text
