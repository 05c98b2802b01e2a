"""Promise 1: slimfx writes and reads no pickle of its own, and evaluates no text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for name in ("slimfx", "passes", "runtime") for path in (ROOT / name).rglob("*.py")]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
HARMLESS = {"UnpicklingError"}
"""A name that only catches what torch raises."""


def breaches(source: str) -> Iterator[str]:
    """What a file does that could run text or bytes from elsewhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield from (alias.name for alias in node.names if alias.name not in HARMLESS)
        if isinstance(node, ast.Call):
            yield from _of_call(ast.unparse(node.func), {k.arg: k.value for k in node.keywords})


def _of_call(name: str, given: dict[str | None, ast.expr]) -> Iterator[str]:
    if name in ("eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "torch.save"):
        yield name
    for function, argument, safe in (
        ("torch.load", "weights_only", True),
        ("np.load", "allow_pickle", False),
        ("numpy.load", "allow_pickle", False),
    ):
        value = given.get(argument)
        if name == function and not (isinstance(value, ast.Constant) and value.value is safe):
            yield f"{name} without {argument}={safe}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_pickle(path: Path) -> None:
    assert list(breaches(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "torch.load(f)", "eval(text)"),
        *("torch.load(f, weights_only=False)", "np.load(f)", "yaml.load(f)", "torch.save(x, f)"),
    ],
)
def test_each_breach_is_found(source: str) -> None:
    assert list(breaches(source))
