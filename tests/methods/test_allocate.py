"""The choice over all places, beside trying every combination."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfx.methods.allocate import Option, allocate, hull

OPTION = st.builds(Option, st.integers(0, 30), st.integers(0, 100))
PLACES = st.lists(st.lists(OPTION, min_size=1, max_size=5), min_size=1, max_size=4)


def total(places: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> Option:
    options = [place[i] for place, i in zip(places, chosen, strict=True)]
    return Option(sum(o.spend for o in options), sum(o.value for o in options))


def every(places: list[list[Option]]) -> list[Option]:
    return [total(places, c) for c in product(*(range(len(place)) for place in places))]


def largest_step(places: list[list[Option]]) -> float:
    """The most that one step along any hull gains."""
    gains = [0.0]
    for place in places:
        corners = [place[i].value for i in hull(place)]
        gains += [a - b for a, b in pairwise(corners)]
    return max(gains)


@given(PLACES, st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_is_within_one_step_of_the_best_combination(places: list[list[Option]], limit: int) -> None:
    chosen = allocate(places, limit)
    possible = [t.value for t in every(places) if t.spend <= limit]
    if chosen is None:
        assert not possible
        return
    found = total(places, chosen)
    assert found.spend <= limit
    assert min(possible) <= found.value <= min(possible) + largest_step(places)


@given(PLACES, st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_is_the_best_where_a_multiplier_says_so(places: list[list[Option]], m: int) -> None:
    """What minimises value + m spend in each place is the best for what it spends."""
    by_multiplier = [min(place, key=lambda o: (o.value + m * o.spend, o.spend)) for place in places]
    limit = sum(option.spend for option in by_multiplier)
    chosen = allocate(places, limit)
    assert chosen is not None
    assert total(places, chosen).value == min(t.value for t in every(places) if t.spend <= limit)


@given(PLACES, st.integers(0, 120))
@settings(max_examples=100, deadline=None)
def test_no_single_change_that_fits_is_better(places: list[list[Option]], limit: int) -> None:
    chosen = allocate(places, limit)
    if chosen is None:
        return
    found = total(places, chosen)
    for p, place in enumerate(places):
        for i in range(len(place)):
            changed = total(places, [*chosen[:p], i, *chosen[p + 1 :]])
            assert changed.spend > limit or changed.value >= found.value


def test_the_hull_leaves_out_what_a_mixture_beats() -> None:
    options = [Option(4, 1), Option(0, 10), Option(2, 7), Option(2, 9), Option(3, 2), Option(5, 1)]
    assert hull(options) == [1, 4, 0]


@pytest.mark.parametrize("limit", [-1, 4.5])
def test_too_little_for_the_least_is_none(limit: float) -> None:
    places = [[Option(2, 1), Option(3, 0)], [Option(3, 1)]]
    assert allocate(places, limit) is None
    assert allocate(places, 5) == [0, 0]
    assert allocate(places, 6) == [1, 0]


def test_an_option_that_spends_without_end_is_never_chosen() -> None:
    never = Option(float("inf"), 0.0)
    assert allocate([[never, Option(2, 5)], [Option(1, 1)]], 3) == [1, 0]
    assert allocate([[Option(4, 1), never, Option(2, 5)]], 5) == [0]


def test_what_lies_on_the_line_between_two_is_no_corner() -> None:
    assert hull([Option(0, 10), Option(1, 5), Option(2, 0)]) == [0, 2]


def test_the_steepest_step_comes_first_and_may_take_all_that_is_left() -> None:
    steep, long = [Option(0, 10), Option(1, 4)], [Option(0, 20), Option(10, 10)]
    assert allocate([steep, long], 10) == [1, 0]
    steep, short = [Option(0, 10), Option(5, 0)], [Option(0, 4), Option(4, 0)]
    assert allocate([steep, short], 5) == [1, 0]


def test_what_is_left_goes_to_what_fits_the_largest_gain_first() -> None:
    small = [Option(1, 5), Option(1.9, 4.5), Option(6, 0)]
    steep = [Option(1, 10), Option(1.5, 0)]
    large = [Option(1, 10), Option(4, 6), Option(5, 0)]
    # after the bases and the steep step 3.95 are left, too little for either other step
    assert allocate([small, steep, large], 3 + 0.5 + 3.95) == [1, 1, 1]
    assert allocate([[Option(2, 1), Option(5, 0.6), Option(6, 0)]], 5) == [1]
    assert allocate([], 1) == []


def test_a_step_along_the_hull_comes_before_a_larger_gain() -> None:
    steep = [Option(0, 10), Option(1, 4), Option(20, 3.9)]
    long = [Option(0, 20), Option(9.5, 10)]
    assert allocate([steep, long], 10) == [1, 0]
    assert allocate([long, steep], 10) == [0, 1]
