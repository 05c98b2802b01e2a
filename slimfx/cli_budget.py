"""`slimfx compress` with a budget: its options, and the recipe that is searched for one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer
from torch.export import ExportedProgram

from slimfx.budget import Target, fit
from slimfx.candidates import LAYOUTS
from slimfx.cli_arguments import names_in
from slimfx.errors import BudgetError
from slimfx.ranks import Ranks
from slimfx.recipe import Recipe

Bits = Annotated[
    float | None,
    typer.Option(help="Search a recipe: stored bits for each weight of the linears, at most."),
]
TargetSize = Annotated[
    str | None, typer.Option(help="Search a recipe: bytes of the file at most, such as 2.0GiB.")
]
MaxLoss = Annotated[
    str | None,
    typer.Option(help="Search the smallest recipe: rise of perplexity on --text, such as 2%."),
]
TargetLatency = Annotated[
    str | None,
    typer.Option(
        help="Search a recipe: time that the linears take for one token on this processor at most, "
        "such as 9ms."
    ),
]
Text = Annotated[
    str | None,
    typer.Option(help="Held-out text for --max-loss. Default: the English of the running Python."),
]
Layouts = Annotated[
    str | None,
    typer.Option(help=f"What a searched recipe may use, with commas, of {', '.join(LAYOUTS)}."),
]

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_A_SECOND = {"us": 1e6, "ms": 1e3, "s": 1}


def target_of(
    bits: float | None,
    target_size: str | None,
    max_loss: str | None,
    target_latency: str | None = None,
    recipe: str | None = None,
) -> Target | None:
    """The budget that the options or the recipe ask for, if any."""
    budget = None if recipe is None else Recipe.load(recipe).budget
    if (bits, target_size, max_loss, target_latency) == (None,) * 4:
        return budget
    if budget is not None:
        raise BudgetError(f"{recipe} has a budget, and the command another; leave one out")
    return Target(
        bits=bits,
        size=None if target_size is None else _bytes(target_size),
        loss=None if max_loss is None else _share(max_loss),
        latency=None if target_latency is None else _seconds(target_latency),
    )


def recipe_for(
    program: ExportedProgram,
    recipe: str | None,
    data: str | None,
    target: Target | None,
    ranks: Ranks,
    *,
    text: str | None = None,
    layouts: str | None = None,
    progress: Callable[[float, str], None],
) -> Recipe | str:
    """The recipe as it is given, or the one searched for a budget with its solver and adapters."""
    if target is None:
        if text is not None or layouts is not None:
            raise typer.BadParameter("--text and --layouts go with a budget; give --bits or others")
        return recipe or "joint"
    options: dict[str, Any] = {} if layouts is None else {"layouts": names_in(layouts)}
    return fit(
        *(program, target, data),
        recipe=recipe or "joint-q",
        text=text,
        remembered=True,
        progress=progress,
        ranks=ranks,
        **options,
    )


def planned_latency(
    program: ExportedProgram, recipe: Recipe | str, target: Target | None
) -> dict[str, float]:
    """Milliseconds of one token in the linears, where they were asked for."""
    if target is None or target.latency is None:
        return {}
    from slimfx.latency import latency  # loads the compiler, slow

    return {"ms_planned": 1e3 * latency(program, Recipe.load(recipe))}


def _bytes(text: str) -> float:
    number, unit = _number(text, "--target-size", "2.0GiB, 800MB or a number of bytes")
    if unit.upper() not in _UNITS:
        raise BudgetError(
            f"--target-size {text}: {unit!r} is not one of B, KiB, MiB, GiB, KB, MB, GB"
        )
    return number * _UNITS[unit.upper()]


def _share(text: str) -> float:
    number, unit = _number(text, "--max-loss", "2% or 0.02")
    if unit not in ("", "%"):
        raise BudgetError(f"--max-loss {text}: {unit!r} is not %")
    return number / 100 if unit else number


def _seconds(text: str) -> float:
    number, unit = _number(text, "--target-latency", "9ms, 800us or 0.5s")
    if unit not in _A_SECOND:
        raise BudgetError(f"--target-latency {text}: {unit!r} is not one of {', '.join(_A_SECOND)}")
    return number / _A_SECOND[unit]


def _number(text: str, option: str, form: str) -> tuple[float, str]:
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z%]*)\s*", text)
    if found is None:
        raise BudgetError(f"{option} {text}: give {form}")
    return float(found[1]), found[2]
