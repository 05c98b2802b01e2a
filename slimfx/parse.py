"""From plain mappings, as YAML has them, to frozen dataclasses; what is misspelt is named."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from slimfx.errors import RecipeError

T = TypeVar("T")


def changed(base: T | None, change: Any, cls: type[T], where: str) -> T | None:
    """A step with other settings; null leaves it out, and no settings leave it as it is."""
    if change is None:
        return None
    if not isinstance(change, Mapping):
        raise RecipeError(f"{where}: {change!r} is not a mapping of settings")
    own = {} if base is None else dataclasses.asdict(base)  # type: ignore[call-overload]
    return build(cls, {**own, **change}, where) if change else base


def check_keys(data: Mapping[str, Any], cls: type, where: str, extra: tuple[str, ...] = ()) -> None:
    """Refuse keys that are no field of `cls` (nor in `extra`), with the closest one that is."""
    allowed = [f.name for f in dataclasses.fields(cls)] + list(extra)
    for key in data:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RecipeError(
                f"{_join(where, key)}: no such key{hint} (allowed: {', '.join(sorted(allowed))})"
            )


def build(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from a mapping of its fields; `where` begins the names in errors."""
    check_keys(data, cls, where)
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if item.default is item.default_factory is dataclasses.MISSING and item.name not in data:
            raise RecipeError(f"{where}: the key {item.name} is missing")
    kinds = typing.get_type_hints(cls)
    return cls(
        **{key: _convert(value, kinds[key], _join(where, key)) for key, value in data.items()}
    )


def _convert(value: Any, kind: Any, where: str) -> Any:
    if kind is Any:
        return value
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: {value!r} is not a mapping of settings")
        return build(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where}: {value!r} is not a list")
        item = typing.get_args(kind)[0]
        return tuple(_convert(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{where}: {value!r} is not of type {kind.__name__}")
    return value


def plain(value: Any) -> Any:
    """Data as JSON has it; a whole number is an int, so that equal recipes look equal."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
