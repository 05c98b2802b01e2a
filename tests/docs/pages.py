"""The code blocks of a page, run one after the other in a folder of their own."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

import slimfx
from slimfx.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(
    r'^(?P<slow><!-- slow -->\n)?```(?P<language>\w+)(?: title="(?P<title>[\w./]+)")?\n'
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    """ "python", "sh" or "yaml" (a recipe)."""
    title: str | None
    """The file that it is, which later blocks import or run."""
    code: str
    slow: bool
    line: int


def blocks(text: str) -> Iterator[Block]:
    """Every fenced block of a page."""
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(*found.group("language", "title", "code"), found["slow"] is not None, line)


def indented(text: str) -> list[str]:
    """The lines of blocks that are no fenced ones, which show what cannot run here."""
    outside = _BLOCK.sub("\n", text)
    return re.findall(r"(?<=\n\n)    (\S.*)", outside)


def run_page(page: Path, *, slow: bool) -> None:
    """Run the blocks of a page in the current folder; with `slow` those that take minutes too."""
    if not Path("examples").exists():
        Path("examples").symlink_to(ROOT / "examples")
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.slow and not slow:
            continue
        try:
            if block.title is not None:
                Path(block.title).write_text(block.code, encoding="utf-8")
            else:
                _RUN[block.language](block.code, names)
        except (Exception, SystemExit) as failure:
            raise AssertionError(f"{page.name}, line {block.line}: {failure!r}") from failure


def _python(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "<page>", "exec"), names)


def _recipe(code: str, names: dict[str, Any]) -> None:
    slimfx.Recipe.from_dict(yaml.safe_load(code))


def _shell(code: str, names: dict[str, Any]) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        own = _assignments(words)
        words = words[len(own) :]
        if words[0] == "slimfx":
            done = CliRunner().invoke(app, words[1:], env=own, catch_exceptions=False)
            assert done.exit_code == 0, done.output[-2000:]
        else:
            assert words[0] == "python", f"{line!r}: neither slimfx nor python"
            said = subprocess.run(
                [sys.executable, *words[1:]],
                env={**os.environ, **own},
                capture_output=True,
                text=True,
            )
            assert said.returncode == 0, said.stderr[-2000:]


def _assignments(words: list[str]) -> dict[str, str]:
    """The NAME=value that a command begins with."""
    found = itertools.takewhile(re.compile(r"[A-Z_]+=").match, words)
    return dict(word.split("=", 1) for word in found)


_RUN: dict[str, Callable[[str, dict[str, Any]], None]] = {
    "python": _python,
    "sh": _shell,
    "yaml": _recipe,
}
