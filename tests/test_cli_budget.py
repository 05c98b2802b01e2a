"""Budgets on the command line: what the options mean, and that the file keeps to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import captured, demo_lm, word_tokenizer
from slimfx.passes.base import edit
from slimfx.runtime.manifest import Manifest, attach
from slimfx.runtime.targets import pt2
from test_cli import from_json, run

from slimfx import cli_budget
from slimfx.budget import Target
from slimfx.errors import BudgetError
from slimfx.recipe import Recipe

RECIPE = """
preset: joint-q
calibration: {samples: 2, length: 64}
skip: ["lm_head", "*.layers.[1-5].*", "*.mlp.*"]
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo model's program, and a recipe that leaves most of it as it is."""
    folder = tmp_path_factory.mktemp("budget")
    pt2.save(demo_lm(), folder / "dense.pt2")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "dense.pt2", folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ((3.4, None, None), Target(bits=3.4)),
        ((None, "2.0GiB", None), Target(size=2 * 2**30)),
        ((None, "800 MB", None), Target(size=800e6)),
        ((None, "1500kB", None), Target(size=1.5e6)),
        ((None, "123456", None), Target(size=123456)),
        ((None, None, "2%"), Target(loss=0.02)),
        ((None, None, "0.5"), Target(loss=0.5)),
        ((None, None, None, "9ms"), Target(latency=9 / 1e3)),
        ((None, None, None, "0.5 s"), Target(latency=0.5)),
        ((None, None, None), None),
    ],
)
def test_options_become_a_target(given: Any, target: Target | None) -> None:
    assert cli_budget.target_of(*given) == target


def test_bits_are_those_of_the_file(demo: tuple[Path, Path], tmp_path: Path) -> None:
    dense, recipe = demo
    out = tmp_path / "small.pt2"
    said = from_json(run("compress", dense, "-o", out, "-r", recipe, "--bits", 4.2, "--json"))
    assert 0.99 * 4.2 <= said["bits_per_weight"] <= 4.2
    assert said["bytes"] == out.stat().st_size <= 1.01 * said["bytes_planned"]
    manifest = pt2.read_manifest(out)
    assert len(manifest.recipe["overrides"]) == len(manifest.layers) == 4


def test_a_budget_in_the_recipe_is_that_of_the_option(
    demo: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, plain = demo
    recipe, out = tmp_path / "budget.yaml", tmp_path / "small.pt2"
    recipe.write_text(f"{plain.read_text()}budget: {{bits: 4.2}}\n")
    from_json(run("compress", dense, "-o", out, "-r", recipe, "--json"))
    asked, other = pt2.read_manifest(out), tmp_path / "other.pt2"
    from_json(run("compress", dense, "-o", other, "-r", plain, "--bits", 4.2, "--json"))
    assert asked.recipe == pt2.read_manifest(other).recipe
    done = run("compress", dense, "-o", out, "-r", recipe, "--bits", 4)
    assert done.code == 1 and "has a budget, and the command another; leave one out" in done.err
    with pytest.raises(BudgetError, match="give exactly one"):
        Recipe.from_yaml("budget: {bits: 3, loss: 0.1}")


def test_a_target_size_is_the_size_of_the_file(demo: tuple[Path, Path], tmp_path: Path) -> None:
    dense, recipe = demo
    out, size = tmp_path / "small.pt2", dense.stat().st_size - 600_000
    line = ("compress", dense, "-o", out, "-r", recipe, "--layouts", "2:4 int4, int4, int8")
    from_json(run(*line, "--target-size", f"{size}B", "--json"))
    assert out.stat().st_size == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--bits", "0.5"], 1, "0.5 bits a weight are impossible; the nearest possible is"),
        (["--bits", "3", "--max-loss", "2%"], 1, "a budget is one of bits, size, loss and latency"),
        (["--target-size", "2 stone"], 1, "'stone' is not one of B, KiB"),
        (["--target-size", "large"], 1, "--target-size large: give 2.0GiB"),
        (["--max-loss", "2dB"], 1, "--max-loss 2dB: 'dB' is not %"),
        (["--target-latency", "9"], 1, "--target-latency 9: '' is not one of us, ms, s"),
        (["--target-latency", "1us"], 1, "0.001 ms a token are impossible; the nearest possible"),
        (["--layouts", "int4"], 2, "--text and --layouts go with a budget"),
        (["--bits", "4", "-r", "slim"], 1, "a budget is searched for solve.method joint"),
    ],
)
def test_what_is_impossible_is_one_line(
    tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    dense, text, recipe = (tmp_path / name for name in ("dense.pt2", "text.txt", "recipe.yaml"))
    pt2.save(attach(edit(captured("llama")).finish(), Manifest(tokenizer=word_tokenizer())), dense)
    text.write_text("w1 w2 w3 w4 w5 " * 40)
    recipe.write_text("{preset: joint-q, calibration: {samples: 2, length: 24}}")
    chosen = [] if "-r" in options else ["-r", recipe]
    said = run("compress", dense, "-o", tmp_path / "small.pt2", "-d", text, *chosen, *options)
    assert said.code == code
    assert message in " ".join(said.err.replace("│", " ").split())
    assert not (tmp_path / "small.pt2").exists()
