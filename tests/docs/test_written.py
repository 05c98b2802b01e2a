"""What programs write into the documentation is what they would write now, and tables written by
hand leave nothing out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from slimfx.runtime.manifest import LayerReport

from slimfx import recipe, steps

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
STEPS = {
    "Recipe": recipe.Recipe,
    "Prune": steps.Prune,
    "Quantize": steps.Quantize,
    "Adapter": steps.Adapter,
    "Solve": steps.Solve,
    "Transform": steps.Transform,
    "Inputs": steps.Inputs,
    "Tune": steps.Tune,
    "Calibration": recipe.Calibration,
}


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write = program("write")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_written_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert write.written(text) == text, "run: python docs/write.py"


def test_every_part_is_on_a_page() -> None:
    pages = [page.read_text(encoding="utf-8") for page in DOCS.glob("*.md")]
    assert {part for page in pages for _, part, _ in write.PART.findall(page)} == set(write.PARTS)


def test_pictures_are_as_they_are_drawn() -> None:
    drawn = {f"{name}.svg": draw() for name, draw in program("draw").DRAWN.items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in write.HERE.glob("*/*.svg")}
    assert found == drawn, "run: python docs/draw.py"


@pytest.mark.parametrize("name", dict(write.leaves()))
def test_the_example_of_a_command_is_one(name: str) -> None:
    command = dict(write.leaves())[name]
    words = shlex.split(write.told(command)[1])
    own = ["slimfx", *name.split()]
    assert words[: len(own)] == own
    command.make_context(name, words[len(own) :])


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without their column names."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = re.split(rf"^## {heading}$", text, flags=re.MULTILINE)[1].partition("\n## ")[0]
    table = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in table[2:]]


def written_default(value: Any) -> str:
    """As YAML writes it."""
    plain = {None: "null", True: "true", False: "false"}
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return plain[value] if value is None or isinstance(value, bool) else str(value)


@pytest.mark.parametrize("heading", STEPS)
def test_every_key_of_a_recipe_is_told_with_its_default(heading: str) -> None:
    told = {key.strip("`"): default for key, default, _ in rows("recipes.md", heading)}
    fields = dataclasses.fields(STEPS[heading])
    assert list(told) == [field.name for field in fields] or heading == "Recipe"
    assert set(told) == {field.name for field in fields}
    for field in fields:
        if field.default is not dataclasses.MISSING:
            assert told[field.name] == written_default(field.default), field.name
        else:
            assert told[field.name] == "see below", field.name


def test_every_field_of_a_layers_row_is_told() -> None:
    told = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows("report.md", "A layer's row")))
    assert told == [field.name for field in dataclasses.fields(LayerReport)]


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in DOCS.glob("*.md")}
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img)[^>]*(?:src|href)=\"?([^\" >]+)", page.read_text()
        )
        assert [name for name in loaded if re.match(r"(https?:)?//", name)] == []
