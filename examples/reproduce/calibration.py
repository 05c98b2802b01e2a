"""Quality against how much text calibrates, and against which.

python examples/reproduce/calibration.py MODEL -o calibration.png --also other.txt
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import study
from matplotlib.figure import Figure

from slimfx import show
from slimfx.data import python_documents
from slimfx.recipe import Recipe

OWN = "Python's English"


def main(words: Sequence[str]) -> list[study.Point]:
    """A point for each preset and count, then one for each preset and source."""
    parser = study.options(__doc__, "slim,joint-q")
    parser.add_argument("--counts", type=study.numbers, default=(1, 4, 16, 64, 128))
    parser.add_argument("--also", action="append", default=[], help="another text; again for more")
    args = parser.parse_args(words)
    of = study.study_of(args)
    sources = {Path(source).name: source for source in (args.data, *args.also) if source}
    sources[OWN] = python_documents()[0]
    return study.finish(_points(of, args, sources), args.output, draw)


def _points(of: study.Study, args, sources: dict) -> Iterator[study.Point]:  # type: ignore[no-untyped-def]
    cases = [
        *((p, p, count, args.data) for p in args.presets for count in args.counts),
        *((p, f"{p} on {name}", 0, data) for p in args.presets for name, data in sources.items()),
    ]
    with show.line("reproduce") as tell:
        yield of.dense()
        for i, (preset, series, count, data) in enumerate(cases):
            tell(i / len(cases), series)
            sampling = of.sampling
            if count:
                sampling = dataclasses.replace(sampling, samples=int(count))
            at = dataclasses.replace(of, sampling=sampling)
            yield at.point(series, float(count), Recipe.preset(preset), data)


def draw(figure: Figure, points: list[study.Point]) -> None:
    """Counts on the left, sources on the right."""
    figure.set_size_inches(11, 4.5)
    left, right = figure.subplots(1, 2)
    dense, *others = points
    study.lines(left, [dense, *(point for point in others if point.x)])
    left.set_xscale("log", base=2)
    left.set_xlabel("windows that calibrate")
    sets = [point for point in others if not point.x]
    right.plot([point.quality for point in sets], [point.series for point in sets], "o")
    right.axvline(dense.quality, color="grey", linewidth=1)
    right.set_xlabel(dense.metric)
    right.grid(alpha=0.3)


if __name__ == "__main__":
    study.run(main)
