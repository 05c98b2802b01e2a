"""The page in headless Chromium: axe finds nothing, buttons sort, nothing is loaded, nothing runs.

A probe holds the page in a frame and looks at it; the page's own policy stays in force.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from models import compressed
from slimfx.runtime.targets import pt2

from slimfx.report import Report, report
from slimfx.report_page import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
AXE = importlib.util.find_spec("axe_core_python")
HOSTILE = "</script><script>parent.ran = true</script><img src=x onerror='parent.ran = true'>"
PROBE = """<!doctype html><title>wait</title>
<iframe width="{width}" height="900" srcdoc="{page}"></iframe>
<script>
async function probe(page, view) {{ {script} }}
document.querySelector("iframe").addEventListener("load", async (event) => {{
  const view = event.target.contentWindow;
  try {{ document.title = JSON.stringify(await probe(view.document, view)); }}
  catch (error) {{ document.title = JSON.stringify({{ error: String(error) }}); }}
}});
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is there")


def chromium(folder: Path, url: Path, *options: str) -> str:
    """What the browser prints; no name is looked up."""
    assert BROWSER is not None
    line = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
        *("--virtual-time-budget=20000", *options, url.as_uri()),
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probed(folder: Path, text: str, script: str, *options: str, width: int = 1000) -> Any:
    """What a function of (page, view) returns, asked from outside of the page."""
    probe = folder / "probe.html"
    made = PROBE.format(page=html.escape(text), script=script, width=width)
    probe.write_text(made, encoding="utf-8")
    dumped = chromium(folder, probe, "--dump-dom", *options)
    title = html.unescape(dumped.split("<title>")[1].split("</title>")[0])
    assert title != "wait", dumped[:2000]
    return json.loads(title)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("browser") / "small.pt2"
    pt2.save(compressed("mlp", "slim-q"), path)
    return report(path)


@pytest.fixture(scope="module")
def pages(real: Report) -> dict[str, str]:
    """One artifact, and two side by side."""
    return {"one": page([real]), "two": page([real, real], real)}


@pytest.mark.skipif(AXE is None, reason="axe-core-python is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("which", ["one", "two"])
def test_axe_finds_nothing(
    tmp_path: Path, pages: dict[str, str], which: str, width: int, scheme: str
) -> None:
    assert AXE is not None and AXE.origin is not None
    axe = Path(AXE.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    quoted = json.dumps(axe).replace("</", "<\\/")
    script = f"""
      page.querySelectorAll("details").forEach((each) => {{ each.open = true; }});
      view.eval({quoted});
      const found = await view.axe.run(page);
      const told = (list) => list.map((each) => [each.id, each.nodes.map((node) => node.html)]);
      return {{ wrong: told(found.violations), passes: found.passes.map((each) => each.id),
               dark: view.matchMedia("(prefers-color-scheme: dark)").matches }};"""
    text = without_policy(pages[which])
    wanted = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    found = probed(tmp_path, text, script, wanted, width=width)
    assert found.get("wrong") == [], found
    assert found["dark"] == (scheme == "dark")
    checked = {"color-contrast", "html-has-lang", "document-title", "heading-order", "region"}
    assert checked | {"button-name", "svg-img-alt", "scope-attr-valid"} <= set(found["passes"])


def without_policy(text: str) -> str:
    """A page that lets axe run in it."""
    start = text.index("<meta http-equiv")
    return text[:start] + text[text.index(">", start) + 1 :]


@pytest.mark.parametrize(
    ("heading", "orders"),
    [
        ("bytes", [("descending", "90,8,7,∞"), ("ascending", "7,8,90,∞")]),
        ("layer", [("ascending", "8,90,7,∞"), ("descending", "∞,7,90,8")]),
    ],
)
def test_a_button_in_a_heading_sorts(
    tmp_path: Path, real: Report, heading: str, orders: list[tuple[str, str]]
) -> None:
    """The rows a, b, c, d have 8, 90, 7 bytes; d has no number and stays the last."""
    rows = [
        dataclasses.replace(real.manifest.layers[0], name=name, bytes=count)
        for name, count in (("b", 90), ("a", 8), ("c", 7))
    ]
    manifest = dataclasses.replace(real.manifest, layers=tuple(rows))
    text = page([dataclasses.replace(real, manifest=manifest)])
    script = f"""
      const table = [...page.querySelectorAll("table")].find(
        (each) => each.caption.textContent === "Every compressed layer");
      const headings = [...table.tHead.rows[0].cells];
      const place = headings.findIndex((each) => each.textContent === "bytes");
      const last = table.tBodies[0].rows[0].cloneNode(true);
      last.cells[0].textContent = "d";
      last.cells[place].textContent = "";
      table.tBodies[0].prepend(last);
      const heading = headings.find((each) => each.textContent === "{heading}");
      const seen = [];
      for (let i = 0; i < 2; i++) {{
        const button = heading.querySelector("button");
        button.focus();
        if (page.activeElement !== button) return "the keyboard does not reach it";
        button.click();
        const order = [...table.tBodies[0].rows].map((row) => row.cells[place].textContent || "∞");
        const others = headings.filter((each) => each !== heading);
        if (others.some((each) => each.getAttribute("aria-sort") !== "none")) return "two sorts";
        seen.push([heading.getAttribute("aria-sort"), order.join()]);
      }}
      return seen;"""
    assert probed(tmp_path, text, script) == [list(order) for order in orders]


def test_nothing_of_a_file_runs_and_nothing_is_loaded(tmp_path: Path, real: Report) -> None:
    row = dataclasses.replace(real.manifest.layers[0], name=HOSTILE, notes=(HOSTILE,))
    manifest = dataclasses.replace(real.manifest, layers=(row,), recipe={HOSTILE: HOSTILE})
    hostile = dataclasses.replace(real, name=HOSTILE, manifest=manifest)
    script = """return {
        ran: window.ran === true, scripts: page.scripts.length, images: page.images.length,
        loaded: view.performance.getEntriesByType("resource").map((each) => each.name),
        shown: page.querySelector("h1").textContent, wide: page.body.scrollWidth };"""
    for text in (page([hostile]), page([hostile, hostile])):
        found = probed(tmp_path, text, script)
        assert not found["ran"] and (found["scripts"], found["images"]) == (1, 0)
        assert found["loaded"] == []
        assert HOSTILE in found["shown"]


def test_the_policy_stops_a_script_that_got_in(tmp_path: Path, pages: dict[str, str]) -> None:
    script = "return [window.ran === true, view.getComputedStyle(page.body).maxWidth];"
    evil = "<script>parent.ran = true</script></main>"
    text = pages["one"].replace("</main>", evil)
    assert probed(tmp_path, text, script) == [False, "1152px"]  # and our own style stands
    assert probed(tmp_path, without_policy(text), script)[0] is True


@pytest.mark.parametrize("which", ["one", "two"])
def test_a_phone_shows_the_page_without_scrolling_sideways(
    tmp_path: Path, pages: dict[str, str], which: str
) -> None:
    script = "return [page.documentElement.scrollWidth, view.innerWidth];"
    wide, screen = probed(tmp_path, pages[which], script, width=360)
    assert wide <= screen == 360


def test_a_screenshot_shows_more_than_paper(tmp_path: Path, pages: dict[str, str]) -> None:
    (tmp_path / "page.html").write_text(pages["one"], encoding="utf-8")
    shot = tmp_path / "page.png"
    chromium(tmp_path, tmp_path / "page.html", f"--screenshot={shot}", "--window-size=800,900")
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 20_000
