"""The plot of a report: the signal to noise of each layer, two dots one above the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _FOOT, _TOP = 360, 170, 28, 16, 6
_LIMIT = 1000.0
"""A signal to noise in dB beyond which nothing is drawn."""


@dataclass(frozen=True)
class Plot:
    """Coordinates of an SVG, and the text that says the same."""

    title: str
    text: str
    names: tuple[str, ...]
    dots: tuple[tuple[tuple[float, float, str], ...], ...]
    """For each name (x, y, what it shows)."""
    stems: tuple[tuple[float, float, float], ...]
    """(x, y of one dot, y of the other)."""
    ticks: tuple[tuple[float, str], ...]
    radius: float
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT


def snr_plot(title: str, series: Mapping[str, Mapping[str, float]]) -> Plot | None:
    """Layers from left to right, dB upwards; None where there is nothing to draw.

    Args:
        series: name -> layer -> dB; the layers of the first one come first.
    """
    drawn = {
        name: {layer: dB for layer, dB in values.items() if abs(dB) < _LIMIT}
        for name, values in series.items()
    }
    layers = list(dict.fromkeys(layer for values in series.values() for layer in values))
    every = [dB for values in drawn.values() for dB in values.values()]
    if not every:
        return None
    marks = _marks(min(every), max(every))
    step = (_WIDTH - _LEFT) / len(layers)
    xs = {layer: round(_LEFT + step * (i + 0.5), 1) for i, layer in enumerate(layers)}

    def y(dB: float) -> float:
        share = (dB - marks[0]) / (marks[-1] - marks[0])
        return round(_HEIGHT - _FOOT - share * (_HEIGHT - _FOOT - _TOP), 1)

    return Plot(
        title=title,
        text=" ".join(_sentence(name, values) for name, values in drawn.items() if values),
        names=tuple(drawn),
        dots=tuple(
            tuple((xs[layer], y(dB), f"{layer}: {dB:.1f} dB {name}") for layer, dB in each.items())
            for name, each in drawn.items()
        ),
        stems=tuple(
            (x, y(max(both)), y(min(both)))
            for layer, x in xs.items()
            if (both := [values[layer] for values in drawn.values() if layer in values])
        ),
        ticks=tuple((y(mark), f"{mark:g}") for mark in marks),
        radius=round(min(3.0, max(0.8, 0.35 * step)), 2),
    )


def _marks(low: float, high: float) -> list[float]:
    """Round numbers, at least two and about five, from below `low` to above `high`."""
    rough = max(high - low, 1.0) / 4
    ten = 10.0 ** math.floor(math.log10(rough))
    step = next(ten * times for times in (1, 2, 5, 10) if ten * times >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _sentence(name: str, values: Mapping[str, float]) -> str:
    worst, best = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return (
        f"{name[:1].upper()}{name[1:]}: from {values[worst]:.1f} dB ({worst}) to "
        f"{values[best]:.1f} dB ({best}), median {statistics.median(values.values()):.1f} dB."
    )
