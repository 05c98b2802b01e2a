"""Tables as HTML, for notebooks and for the page of `slimfx report`, and as pandas data frames.

Every text that reaches a template is escaped: names, notes and recipes come out of files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2

from slimfx.errors import need


@dataclasses.dataclass(frozen=True)
class Table:
    """A caption, and cells that are text, a number, a tuple of these or None."""

    caption: str
    columns: Mapping[str, str]
    """Heading -> the format of its numbers: "" for text, "bar" for a share that is drawn, too."""
    rows: Sequence[Sequence[Any]]

    def html(self, *, sortable: bool = False) -> str:
        """Rows as they are, or with buttons in the headings, which the page's script makes sort."""
        macros: Any = environment().get_template("table.html").module
        return macros.table(self, sortable)


def shown(value: Any, spec: str) -> str:
    """A cell as people read it; a number that is none is a dash."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, tuple):
        return "; ".join(shown(each, spec) for each in value)
    if isinstance(value, float) and not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    return format(value, ".1%" if spec == "bar" else spec)


@cache
def environment() -> jinja2.Environment:
    """The templates of the package."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("slimfx", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["shown"] = shown
    return made


def table(caption: str, columns: Mapping[str, tuple[str, str]], rows: Sequence[Any]) -> Table:
    """Data classes, a row for each.

    Args:
        columns: heading -> (name of the field, format).
    """
    cells = [[getattr(row, name) for name, _ in columns.values()] for row in rows]
    return Table(caption, {heading: spec for heading, (_, spec) in columns.items()}, cells)


def to_pandas(kind: type, rows: Sequence[Any]) -> Any:
    """Data classes of one kind as a data frame with a column for each field.

    Raises:
        SlimError: pandas is not installed.
    """
    pandas: Any = need("pandas")
    names = [item.name for item in dataclasses.fields(kind)]
    return pandas.DataFrame([[getattr(row, name) for name in names] for row in rows], columns=names)
