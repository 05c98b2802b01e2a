"""Compress small programs in all processes of torchrun: python tests/ranks_job.py FOLDER.

Each job is done twice, with a journal and without; files are named by the job.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from models import RECIPES, captured, ids
from torch import nn
from torch.export import ExportedProgram

import slimfx
from slimfx import Recipe, journal, ranks
from slimfx.recipe import Calibration
from slimfx.steps import Target, Tune

JOBS = {
    "diagonal": ("llama", RECIPES["slim"]),
    "covariance": ("llama", Recipe.preset("joint")),
    "tuned": ("llama", dataclasses.replace(RECIPES["int4"], tune=Tune(epochs=1))),
    "random": ("random", RECIPES["wanda"]),
    "searched": (
        "llama",
        dataclasses.replace(
            Recipe.preset("joint-q"), budget=Target(bits=5), calibration=Calibration(batch=2)
        ),
    ),
}


def program_of(kind: str) -> tuple[ExportedProgram, list[Any]]:
    """A program and five batches, of different lengths where it may be."""
    if kind != "random":
        return captured(kind), [{"input_ids": ids(i, 2, 10 + i)} for i in range(5)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.5), nn.Linear(24, 8)).train()
    batches = [(torch.randn(20, 16),) for _ in range(5)]
    return torch.export.export(model, batches[0]), batches


def main(folder: Path) -> None:
    """Do all jobs."""
    with ranks.joined() as mine:
        for name, (kind, recipe) in JOBS.items():
            program, batches = program_of(kind)
            with journal.opened(folder / name, mine) as book:
                kept = slimfx.compress(program, recipe, batches, journal=book, ranks=mine)
                if mine.own == 0:
                    slimfx.save(kept, folder / f"{name}-kept.pt2", verify=False)
            small = slimfx.compress(program, recipe, batches, ranks=mine)
            if mine.own == mine.size - 1:
                slimfx.save(small, folder / f"{name}.pt2", verify=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
