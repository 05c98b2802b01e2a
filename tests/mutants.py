"""Mutation testing: python tests/mutants.py FILE [COUNT]; COUNT mutants of the file, drawn by seed.

A mutant is the file with one comparison, operator, number or negation changed. It is killed if the
tests of the file's name (tests/runtime/test_pack.py for runtime/pack.py) fail, or hang.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq},
    **{ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.And: ast.Or},
    **{ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Or: ast.And},
    **{
        ast.LShift: ast.RShift,
        ast.RShift: ast.LShift,
        ast.BitAnd: ast.BitOr,
        ast.BitOr: ast.BitAnd,
    },
}


def mutants(source: str) -> Iterator[tuple[int, ast.Module]]:
    """Line and tree of every mutant; annotations and texts stay."""
    for place in range(len(list(ast.walk(ast.parse(source))))):
        tree = ast.parse(source)
        node: Any = list(ast.walk(tree))[place]
        if _change_(node):
            yield node.lineno, ast.fix_missing_locations(tree)


def _change_(node: Any) -> bool:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        if isinstance(node.op, ast.BitOr) and isinstance(node.left, ast.Name):
            return False  # a union of types
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += 1
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        node.value = not node.value
    else:
        return False
    return True


class Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name, self.tree = name, tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.tree, self.name, "exec"), module.__dict__)


def killed(name: str, tree: ast.Module, tests: Path) -> bool:
    """Do the tests fail in a process of its own?"""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.meta_path.insert(0, Instead(name, tree))
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", str(tests)])))
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    """Count the mutants that are killed, and name those that are not."""
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    package = "" if file.parts[0] == "slimfx" else "slimfx."
    name = package + ".".join(file.with_suffix("").parts)
    tests = ROOT / "tests" / Path(*file.parts[file.parts[0] == "slimfx" : -1]) / f"test_{file.name}"
    source = (ROOT / file).read_text(encoding="utf-8")
    if killed(name, ast.parse(source), tests):
        raise SystemExit(f"{tests}: fails without a mutant")
    every = list(mutants(source))
    drawn = random.Random(0).sample(every, min(count, len(every)))
    alive = [line for line, tree in drawn if not killed(name, tree, tests)]
    print(f"{file}: {len(drawn) - len(alive)} of {len(drawn)} mutants killed ({len(every)} in all)")
    print("alive in lines", sorted(alive))


if __name__ == "__main__":
    main()
