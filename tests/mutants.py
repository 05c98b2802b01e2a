"""Mutation testing: python tests/mutants.py FILE... [COUNT]; of each file COUNT mutants, by seed.

A mutant is the file with one comparison, operator, number, sign, negation, bound or rounding
changed. It is killed if the tests of the file's name (tests/runtime/test_pack.py for
runtime/pack.py) fail, or hang. Each runs in a fork that has imported all but slimfx.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

ROOT = Path(__file__).parents[1]
SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq},
    **{ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.And: ast.Or},
    **{ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Or: ast.And},
    **{ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
PAIRS = (("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("any", "all"), ("floor", "ceil"))
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


def mutants(source: str) -> Iterator[tuple[int, ast.Module]]:
    """Line and tree of every mutant; texts stay, and what only declares."""
    for place in range(len(list(_changeable(ast.parse(source))))):
        tree = ast.parse(source)
        node: Any = list(_changeable(tree))[place]
        if _change_(node):
            yield node.lineno, ast.fix_missing_locations(tree)


def _changeable(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node outside annotations and decorators (tests/test_layers.py has data frozen)."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST):
                yield node
                yield from _changeable(node)


def _change_(node: Any) -> bool:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        if isinstance(node.op, ast.BitOr) and isinstance(node.left, ast.Name):
            return False  # a union of types
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        node.operand = ast.UnaryOp(node.op, node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += 1
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        node.value = not node.value
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        node.attr = NAMES[node.attr]
    elif isinstance(node, ast.Name) and node.id in NAMES:
        node.id = NAMES[node.id]
    elif isinstance(node, ast.keyword) and node.arg in NAMES:
        node.arg = NAMES[node.arg]
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


def in_fork(work: Callable[[], int], seconds: float) -> int:
    """The status of `work`, run with no output in a process of its own and for so long at most."""
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        gc.freeze()
        os._exit(work())
    return os.waitpid(child, 0)[1]


def failing(name: str, tree: ast.Module, tests: Path, seconds: float = 900) -> bool:
    """Do the tests fail, or hang?"""

    def work() -> int:
        sys.meta_path.insert(0, Instead(name, tree))
        return run(tests)

    return in_fork(work, seconds) != 0


def run(tests: Path, *more: str) -> int:
    """The exit code of the tests up to the first that fails."""
    plain = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    return int(pytest.main([*plain, *more, str(tests)]))


def import_all_but_ours(tests: Path) -> None:
    """What the tests import and no mutant changes, found in a fork that collects them."""
    read, write = os.pipe()

    def work() -> int:
        run(tests, "--collect-only")
        files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
        theirs = [name for name, file in files.items() if not Path(file or "").is_relative_to(ROOT)]
        os.write(write, "\n".join(theirs).encode())
        return 0

    in_fork(work, 900)
    os.close(write)
    with os.fdopen(read) as names:
        for name in names.read().split():
            if name not in sys.modules and name.partition(".")[0] != "slimfx":
                with suppress(ImportError):
                    importlib.import_module(name)


def changed(source: str, tree: ast.Module) -> str:
    """Where a mutant first differs, and what is around it."""
    old, new = (ast.unparse(each) for each in (ast.parse(source), tree))
    place = next(i for i, (a, b) in enumerate(zip(old, new)) if a != b)
    return " ".join(new[max(0, place - 40) : place + 40].split())


def survivors(file: Path, count: int | None) -> tuple[int, int]:
    """How many mutants of a file there were, and how many of those the tests let live."""
    inside = file.parts[0] == "slimfx"
    name = ("" if inside else "slimfx.") + ".".join(file.with_suffix("").parts)
    tests = ROOT / "tests" / Path(*file.parts[inside:-1]) / f"test_{file.name}"
    source = (ROOT / file).read_text(encoding="utf-8")
    every = list(mutants(source))
    if not every:
        return 0, 0
    import_all_but_ours(tests)
    began = time.monotonic()
    if failing(name, ast.parse(source), tests):
        raise SystemExit(f"{tests}: fails without a mutant")
    limit = 20 + 4 * (time.monotonic() - began)
    drawn = every if count is None else random.Random(0).sample(every, min(count, len(every)))
    alive = [each for each in drawn if not failing(name, each[1], tests, limit)]
    print(f"{file}: {len(drawn) - len(alive)} of {len(drawn)} killed ({len(every)} in all)")
    for line, tree in sorted(alive, key=lambda each: each[0]):
        print(f"   alive, line {line}: {changed(source, tree)}", flush=True)
    return len(drawn), len(alive)


def main() -> None:
    """Count the mutants that are killed, and name those that are not."""
    torch.set_num_threads(1)
    settings.register_profile("seen", phases=[Phase.explicit, Phase.generate])  # none made small
    settings.load_profile("seen")
    count = int(sys.argv[-1]) if sys.argv[-1].isdigit() else None
    found = [survivors(Path(file), count) for file in sys.argv[1:] if not file.isdigit()]
    tried, alive = (sum(numbers) for numbers in zip(*found))
    print(f"{tried - alive} of {tried} mutants killed: {1 - alive / tried:.1%}")


if __name__ == "__main__":
    main()
