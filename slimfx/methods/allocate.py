"""Choose one option in each of many places: least total value within a total spend.

    min over c  sum_l value_l(c_l)    subject to    sum_l spend_l(c_l) <= limit

For a multiplier m, each place alone takes the option with the least value + m spend, which lies on
the lower convex hull of its options; all places together are then optimal for what they spend
(Everett 1963; Shoham and Gersho 1988, section III). As m falls from infinity the places climb their
hulls, the steepest step first. What the next step no longer fits into is filled with the single
changes that gain the most, so that no choice of any total is better by more than one step's gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """What an option takes of the limit, and what is left to be lowered."""

    spend: float
    value: float


def allocate(places: Sequence[Sequence[Option]], limit: float) -> list[int] | None:
    """An option's index for each place, spending at most `limit`; None if the least is too much.

    Ties go to the earlier place and the smaller spend.
    """
    hulls = [hull(options) for options in places]
    chosen = [corners[0] for corners in hulls]
    left = limit - sum(options[i].spend for options, i in zip(places, chosen, strict=True))
    if left < 0:
        return None
    steps = sorted(
        (_slope(places[p][a], places[p][b]), p, k)
        for p, corners in enumerate(hulls)
        for k, (a, b) in enumerate(pairwise(corners))
    )
    for _, p, k in steps:
        a, b = hulls[p][k], hulls[p][k + 1]
        extra = places[p][b].spend - places[p][a].spend
        if chosen[p] == a and extra <= left:  # not behind a step that did not fit
            chosen[p], left = b, left - extra
    return _filled(places, chosen, left)


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the corners of the lower convex hull, the cheapest first, each of lower value;
    an option of infinite spend is none.
    """
    corners: list[int] = []
    finite = (i for i, option in enumerate(options) if math.isfinite(option.spend))
    for i in sorted(finite, key=lambda i: (*options[i], i)):
        if corners and options[i].value >= options[corners[-1]].value:
            continue
        while len(corners) > 1 and _slope(options[corners[-2]], options[corners[-1]]) >= _slope(
            options[corners[-1]], options[i]
        ):
            corners.pop()
        corners.append(i)
    return corners


def _slope(a: Option, b: Option) -> float:
    return (b.value - a.value) / (b.spend - a.spend)


def _filled(places: Sequence[Sequence[Option]], chosen: list[int], left: float) -> list[int]:
    """The choice after every single change that still fits, the largest gain first."""
    chosen = list(chosen)
    while True:
        gain, p, i = max(
            (
                (options[chosen[p]].value - option.value, -p, -i)
                for p, options in enumerate(places)
                for i, option in enumerate(options)
                if option.spend - options[chosen[p]].spend <= left
            ),
            default=(0.0, 0, 0),
        )
        if gain <= 0:
            return chosen
        left -= places[-p][-i].spend - places[-p][chosen[-p]].spend
        chosen[-p] = -i
