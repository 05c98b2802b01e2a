"""The layers of one report, or of two side by side, as tables and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimfx.report_plots import Plot, snr_plot
from slimfx.runtime.manifest import LayerReport
from slimfx.tables import Table

WORDS = (
    "Signal to noise is the energy of what a layer answers over that of its error, in dB, for "
    "inputs that are as large as calibration saw them, but uncorrelated: 3 dB more is half the "
    "error's energy. Recipes that solve against the inputs' covariance (joint, second-order) trade "
    "some of it for less error on inputs as they are, so between recipes perplexity decides.",
    "Taken up is the spectrum of the error: what the leading eighth, quarter, half and all of a "
    "layer's rank take up of the error's energy without adapters. Where half the rank does nearly "
    "what all of it does, a smaller one is enough; where each step adds its part, a larger one "
    "pays.",
    "Clipped is the share of weights more than half a step beyond the largest code; tokens are "
    "those of the calibration that the layer saw.",
)


def layers_plot(layers: Mapping[str, Sequence[LayerReport]]) -> Plot | None:
    """With and without adapters, or the two artifacts; None where there is nothing to draw."""
    series = {mark: {row.name: row.snr for row in rows} for mark, rows in layers.items()}
    if len(layers) == 1:
        (rows,) = layers.values()
        without = {row.name: row.snr_without_adapter for row in rows}
        series = {"without adapters": without, "with adapters": series.popitem()[1]}
    return snr_plot("Signal to noise of each layer", series)


def kinds_table(caption: str, layers: Sequence[LayerReport]) -> Table:
    """Layers with the last part of their name in common."""
    kinds: dict[str, list[LayerReport]] = {}
    for row in layers:
        kinds.setdefault(row.name.rpartition(".")[2], []).append(row)
    columns = {
        **{"kind": "", "layers": "d", "bytes": ",d", "bits a weight": ".3f"},
        **{"lowest SNR, dB": ".1f", "median": ".1f", "median without adapters": ".1f"},
    }
    rows = []
    for kind, own in kinds.items():
        weights = sum(row.out_features * row.in_features for row in own)
        stored = sum(row.bytes for row in own)
        rows.append(
            [
                *(kind, len(own), stored, 8 * stored / weights if weights else math.nan),
                *(lowest(own), statistics.median(row.snr for row in own)),
                statistics.median(row.snr_without_adapter for row in own),
            ]
        )
    return Table(caption, columns, rows)


def lowest(layers: Iterable[LayerReport]) -> float:
    """The lowest signal to noise, in dB; nan where there is none."""
    return min((row.snr for row in layers if not math.isnan(row.snr)), default=math.nan)


def compared_table(layers: Mapping[str, Sequence[LayerReport]]) -> Table:
    """A row for each layer that is in either."""
    found = [{row.name: row for row in rows} for rows in layers.values()]
    rows = []
    for name in dict.fromkeys(name for each in found for name in each):
        a, b = (each.get(name) for each in found)
        row: list[Any] = [name]
        for field in ("snr", "bytes"):
            values: list[Any] = [getattr(each, field) if each else None for each in (a, b)]
            row += [*values, values[1] - values[0] if a and b else None]
        for field in ("layout", "rank"):
            row += [getattr(each, field) if each else None for each in (a, b)]
        rows.append(row)
    columns = {
        **{"layer": "", "SNR, dB, A": ".1f", "SNR, B": ".1f", "SNR, B - A": "+.1f"},
        **{"bytes, A": ",d", "bytes, B": ",d", "bytes, B - A": "+,d"},
        **{"layout, A": "", "layout, B": "", "rank, A": "d", "rank, B": "d"},
    }
    return Table("Every compressed layer of either", columns, rows)
