"""Every code block of the documentation runs as it stands, offline; `make test-slow` runs those
that compile or convert whole models.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pages
import pytest

from slimfx.export import TARGETS
from slimfx.methods import PRUNERS

NAMES = [page.name for page in pages.PAGES]
NOT_RUN = {
    "pip install": "this environment is one",
    "vllm serve": "needs vLLM and a GPU",
}
"""How indented blocks may begin, and why they are not run."""
SLOW = [
    page.name
    for page in pages.PAGES
    if any(block.slow for block in pages.blocks(page.read_text(encoding="utf-8")))
]


def run(name: str, folder: Path, *, slow: bool) -> None:
    added = (patch.dict(PRUNERS), patch.dict(TARGETS))  # a page may add to them
    with pytest.MonkeyPatch.context() as change, added[0], added[1]:
        change.chdir(folder)
        change.syspath_prepend(folder)
        pages.run_page(pages.ROOT / "docs" / name, slow=slow)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the first five minutes make, from which other pages go on."""
    folder = tmp_path_factory.mktemp("start")
    run("index.md", folder, slow=False)
    return folder / "small.pt2"


@pytest.mark.parametrize("name", NAMES)
def test_every_block_runs(name: str, started: Path, tmp_path: Path) -> None:
    shutil.copy(started, tmp_path)
    if name != "index.md":
        run(name, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_slow_block_runs(name: str, started: Path, tmp_path: Path) -> None:
    shutil.copy(started, tmp_path)
    run(name, tmp_path, slow=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_run_is_listed_here(name: str) -> None:
    text = (pages.ROOT / "docs" / name).read_text(encoding="utf-8")
    assert {block.language for block in pages.blocks(text)} <= {"python", "sh", "yaml"}
    assert text.count("\n```") == 2 * len(list(pages.blocks(text)))
    wrong = [line for line in pages.indented(text) if not line.startswith(tuple(NOT_RUN))]
    assert wrong == []


def test_a_block_that_fails_names_its_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 4"):
        pages.run_page(page, slow=False)
