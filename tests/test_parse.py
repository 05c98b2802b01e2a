"""From mappings to dataclasses: every kind of field, every kind of mistake, and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfx.errors import RecipeError
from slimfx.parse import build, changed, check_keys, plain


@dataclass(frozen=True)
class Inner:
    """A step."""

    size: int = 3
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    """One field of each kind."""

    whole: int
    share: float = 0.5
    flag: bool = False
    maybe: float | None = None
    path: str | None = None
    inner: Inner = field(default_factory=Inner)
    absent: Inner | None = None
    names: tuple[str, ...] = ()
    many: tuple[Inner, ...] = ()
    anything: Any = None


FULL = {
    "whole": 7,
    "share": 0.25,
    "flag": True,
    "maybe": 1.5,
    "path": "p",
    "inner": {"size": 9},
    "absent": {"name": "y"},
    "names": ["a", "b"],
    "many": [{"size": 1}, {}],
    "anything": {"deep": [1]},
}


def test_every_field_is_converted_to_its_type() -> None:
    assert build(Outer, FULL, "") == Outer(
        whole=7,
        share=0.25,
        flag=True,
        maybe=1.5,
        path="p",
        inner=Inner(size=9),
        absent=Inner(name="y"),
        names=("a", "b"),
        many=(Inner(size=1), Inner()),
        anything={"deep": [1]},
    )
    assert build(Outer, {"whole": 1}, "") == Outer(1)


@pytest.mark.parametrize("key", ["maybe", "path", "absent"])
def test_null_is_taken_where_the_field_may_be_left_out(key: str) -> None:
    assert getattr(build(Outer, {"whole": 1, key: None}, ""), key) is None


def test_a_whole_number_is_a_number_with_a_point_but_not_the_other_way_round() -> None:
    found = build(Outer, {"whole": 1, "share": 2, "maybe": 3}, "")
    assert (found.share, found.maybe) == (2.0, 3.0)
    assert isinstance(found.share, float) and isinstance(found.maybe, float)
    with pytest.raises(RecipeError, match=r"^whole: 1\.0 is not of type int"):
        build(Outer, {"whole": 1.0}, "")


WRONG = [
    ("whole", None),
    ("whole", True),
    ("whole", "1"),
    ("share", True),
    ("share", "0.5"),
    ("share", None),
    ("share", 10**400),
    ("flag", 1),
    ("flag", 0.0),
    ("flag", "true"),
    ("flag", None),
    ("maybe", False),
    ("maybe", "x"),
    ("path", 3),
    ("inner", None),
    ("inner", [1]),
    ("inner.size", {"size": "3"}),
    ("absent", "x"),
    ("absent.name", {"name": 3}),
    ("names", "ab"),
    ("names", {"a": 1}),
    ("names[1]", ["a", 2]),
    ("many[0]", [3]),
    ("many[1].size", [{}, {"size": True}]),
]


@pytest.mark.parametrize(("where", "value"), WRONG)
@pytest.mark.parametrize("start", ["", "step"])
def test_a_value_of_another_type_is_refused_by_its_place(
    where: str, value: object, start: str
) -> None:
    key = where.partition(".")[0].partition("[")[0]
    with pytest.raises(RecipeError) as caught:
        build(Outer, {"whole": 1, key: value}, start)
    assert str(caught.value).startswith(f"{start}.{where}: " if start else f"{where}: ")


def test_a_field_without_a_default_must_be_there() -> None:
    with pytest.raises(RecipeError, match=r"^step: the key whole is missing"):
        build(Outer, {}, "step")


def test_a_key_that_is_no_field_is_refused_with_the_closest_one() -> None:
    with pytest.raises(RecipeError, match=r"^step\.hole: no such key; did you mean whole\?"):
        check_keys({"hole": 1}, Outer, "step")
    with pytest.raises(RecipeError, match=r"^3: no such key \(allowed: absent, "):
        check_keys({3: 1}, Outer, "")
    check_keys({"whole": 1, "preset": 2}, Outer, "", extra=("preset",))


def test_a_change_keeps_what_it_does_not_name() -> None:
    assert changed(Inner(5, "y"), {"size": 6}, Inner, "x") == Inner(6, "y")
    assert changed(Inner(5, "y"), {}, Inner, "x") == Inner(5, "y")
    assert changed(Inner(5, "y"), None, Inner, "x") is None
    assert changed(None, {}, Inner, "x") is None
    assert changed(None, {"size": 6}, Inner, "x") == Inner(6)
    with pytest.raises(RecipeError, match=r"^x: 4 is not a mapping"):
        changed(Inner(), 4, Inner, "x")
    with pytest.raises(RecipeError, match=r"^x\.sise: no such key; did you mean size\?"):
        changed(Inner(), {"sise": 4}, Inner, "x")


def test_plain_data_has_lists_text_keys_and_whole_numbers() -> None:
    assert plain({1: (2.0, 2.5, {"a": (True, None, "x")})}) == {
        "1": [2, 2.5, {"a": [True, None, "x"]}]
    }
    assert type(plain(2.0)) is int
    assert plain(True) is True


outer = st.builds(
    Outer,
    whole=st.integers(),
    share=st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    maybe=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    path=st.none() | st.text(),
    inner=st.builds(Inner, st.integers(), st.text()),
    absent=st.none() | st.builds(Inner, st.integers(), st.text()),
    names=st.lists(st.text(), max_size=3).map(tuple),
    many=st.lists(st.builds(Inner, st.integers(), st.text()), max_size=2).map(tuple),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(outer)
def test_plain_data_builds_an_equal_object(value: Outer) -> None:
    assert build(Outer, plain(asdict(value)), "") == value
