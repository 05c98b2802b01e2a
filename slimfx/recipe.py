"""The recipe: what to do with each linear, as frozen data that round-trips through YAML."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from slimfx.errors import RecipeError
from slimfx.methods import COMPENSATORS, PRUNERS, QUANTIZERS

T = TypeVar("T")


@dataclass(frozen=True)
class Prune:
    """Which n of every m weights along the inputs stay."""

    method: str = "wanda"
    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        _one_of("prune.method", self.method, (*PRUNERS, "sparsegpt"))
        if not 1 <= self.n < self.m:
            raise RecipeError(f"prune: {self.n}:{self.m} is impossible; n must be from 1 to m - 1")


@dataclass(frozen=True)
class Quantize:
    """The integer codes of the weights that stay."""

    method: str = "slim-quant"
    bits: int = 4
    granularity: str = "tensor"
    """One scale for each "tensor", "channel" (output) or "group" of inputs."""
    group: int = 128
    """Inputs that share a scale when granularity is "group"."""

    def __post_init__(self) -> None:
        _one_of("quantize.method", self.method, QUANTIZERS)
        _one_of("quantize.bits", self.bits, (4,))
        _one_of("quantize.granularity", self.granularity, ("tensor", "channel", "group"))
        _at_least("quantize.group", self.group, 1)
        if self.method != "absmax" and self.granularity != "tensor":
            raise RecipeError(
                f"quantize: method {self.method} fits one scale per tensor, not per "
                f"{self.granularity}; set granularity: tensor, or method: absmax"
            )


@dataclass(frozen=True)
class Adapter:
    """The low-rank pair that takes up the error of pruning and quantization."""

    method: str = "slim-lora"
    rank: float = 0.1
    """Below 1 a share of min(in, out), rounded down; else the rank itself."""
    bits: int = 16
    """16 stores bfloat16, 32 float32, 4 integer codes in groups."""
    group: int = 128
    """Inputs that share a scale when bits is 4."""

    def __post_init__(self) -> None:
        _one_of("adapter.method", self.method, COMPENSATORS)
        _one_of("adapter.bits", self.bits, (4, 16, 32))
        _at_least("adapter.group", self.group, 1)
        if not (
            0 < self.rank < 1 or (math.isfinite(self.rank) and self.rank == int(self.rank) > 0)
        ):
            raise RecipeError(
                f"adapter.rank: {self.rank} is neither a share below 1 nor a whole number above 0"
            )

    def rank_for(self, out_features: int, in_features: int) -> int:
        """The rank of a layer; a share gives at least 1, a number is taken as it is."""
        if self.rank >= 1:
            return int(self.rank)
        return max(1, int(self.rank * min(out_features, in_features)))


@dataclass(frozen=True)
class Solve:
    """How the weight that stays, its codes and the adapter are found together."""

    method: str = "one-shot"
    """ "one-shot": each step by itself. "second-order": SparseGPT and OPTQ in one pass, the errors
    taken up by the weights that are left. "joint": alternates that with the adapter."""
    rounds: int = 8
    """Alternations of "joint"."""

    def __post_init__(self) -> None:
        _one_of("solve.method", self.method, ("one-shot", "second-order", "joint"))
        _at_least("solve.rounds", self.rounds, 1)


@dataclass(frozen=True)
class Calibration:
    """How many samples of which length feed the statistics."""

    samples: int = 64
    length: int = 512
    """Tokens of a sample; a program whose range ends earlier gets its own longest length."""
    batch: int = 8
    """Samples that go through a block together; changes memory, not the result's meaning."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch"):
            _at_least(f"calibration.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class Override:
    """Other settings for the layers whose name matches a pattern."""

    match: str
    prune: Any = field(default_factory=dict)
    quantize: Any = field(default_factory=dict)
    adapter: Any = field(default_factory=dict)
    solve: Any = field(default_factory=dict)
    """Keys that differ from the recipe's own, or null to leave the step out."""


@dataclass(frozen=True)
class LayerRecipe:
    """What the recipe says of one layer."""

    prune: Prune | None
    quantize: Quantize
    adapter: Adapter | None
    solve: Solve = field(default_factory=Solve)

    def __post_init__(self) -> None:
        sparsegpt = self.prune is not None and self.prune.method == "sparsegpt"
        if self.prune is not None and sparsegpt == (self.solve.method == "one-shot"):
            raise RecipeError(
                f"prune.method: {self.prune.method} does not go with solve.method "
                f"{self.solve.method}; sparsegpt needs second-order or joint, the others one-shot"
            )
        if self.solve.method == "joint" and self.adapter and self.adapter.method != "full":
            raise RecipeError(
                f"adapter.method: {self.adapter.method} does not go with solve.method joint; "
                f"set adapter: {{method: full}}"
            )

    @property
    def needs_covariance(self) -> bool:
        """Do the steps use X^T X, and not its diagonal alone?"""
        full = self.adapter is not None and self.adapter.method == "full"
        return full or self.solve.method != "one-shot"


@dataclass(frozen=True)
class Recipe:
    """Everything `slimfx.compress` needs to know; equal recipes give equal files."""

    prune: Prune | None = field(default_factory=Prune)
    quantize: Quantize = field(default_factory=Quantize)
    adapter: Adapter | None = field(default_factory=Adapter)
    solve: Solve = field(default_factory=Solve)
    calibration: Calibration = field(default_factory=Calibration)
    skip: tuple[str, ...] = ("lm_head",)
    """Patterns of layers to leave as they are (see `matches`)."""
    overrides: tuple[Override, ...] = ()
    """The last matching one wins, key by key."""

    def __post_init__(self) -> None:
        plain = together = self._layer()
        for override in self.overrides:
            try:
                together = self._apply(together, override)
            except RecipeError:
                self._apply(plain, override)  # impossible after the others, fine alone

    def for_layer(self, name: str) -> LayerRecipe | None:
        """The settings of layer `name`; None when it is to be skipped."""
        if any(matches(name, pattern) for pattern in self.skip):
            return None
        layer = self._layer()
        for override in self.overrides:
            if matches(name, override.match):
                layer = self._apply(layer, override)
        return layer

    def _layer(self) -> LayerRecipe:
        return LayerRecipe(self.prune, self.quantize, self.adapter, self.solve)

    @staticmethod
    def _apply(layer: LayerRecipe, override: Override) -> LayerRecipe:
        where = f"overrides[{override.match}]"
        quantize = _changed(layer.quantize, override.quantize, Quantize, f"{where}.quantize")
        solve = _changed(layer.solve, override.solve, Solve, f"{where}.solve")
        if quantize is None or solve is None:
            key = "quantize" if quantize is None else "solve"
            raise RecipeError(f"{where}.{key}: null is not allowed; add the layer to skip")
        return LayerRecipe(
            prune=_changed(layer.prune, override.prune, Prune, f"{where}.prune"),
            quantize=quantize,
            adapter=_changed(layer.adapter, override.adapter, Adapter, f"{where}.adapter"),
            solve=solve,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every key present, the canonical form."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """The canonical form as YAML; `from_yaml` reads it back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def digest(self) -> str:
        """SHA-256 of the canonical form."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain data; `preset` names the recipe whose keys are the defaults.

        Raises:
            RecipeError: unknown key, wrong type, or impossible combination, naming the key.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is a mapping of settings, not {data!r}")
        own = dict(data)
        base = cls.preset(own.pop("preset")).to_dict() if "preset" in own else cls().to_dict()
        _check_keys(own, cls, "", extra=("preset",))
        for key, value in own.items():
            if isinstance(value, Mapping) and isinstance(base[key], dict):
                base[key] = {**base[key], **value}
            else:
                base[key] = value
        return _build(cls, base, "")

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Parse YAML (safe subset: no object tags)."""
        try:
            data = yaml.safe_load(text)
            return cls.from_dict({} if data is None else data)
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe is not valid YAML: {error}") from error

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A recipe by name, one of `PRESETS`."""
        _one_of("preset", name, PRESETS)
        return PRESETS[name]

    @classmethod
    def load(cls, source: Recipe | str | Path) -> Recipe:
        """A recipe as it is, a preset's name, or the path of a YAML file."""
        if isinstance(source, Recipe):
            return source
        if str(source) in PRESETS:
            return cls.preset(str(source))
        try:
            return cls.from_yaml(Path(source).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise RecipeError(
                f"{source}: a recipe is a text file, this is not ({error})"
            ) from error
        except OSError as error:
            raise RecipeError(
                f"{source}: no recipe file can be read there ({error.strerror}), and no preset has "
                f"that name; presets: {', '.join(PRESETS)}"
            ) from error


def matches(name: str, pattern: str) -> bool:
    """Does a pattern (* ? [] as in a shell) match a dotted name, or the end of it after a dot?"""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _changed(base: T | None, change: Any, cls: type[T], where: str) -> T | None:
    """A step with other settings; null leaves it out, and no settings leave it as it is."""
    if change is None:
        return None
    if not isinstance(change, Mapping):
        raise RecipeError(f"{where}: {change!r} is not a mapping of settings")
    own = {} if base is None else dataclasses.asdict(base)  # type: ignore[call-overload]
    return _build(cls, {**own, **change}, where) if change else base


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise RecipeError(f"{key}: {value} is below {least}")


def _one_of(key: str, value: Any, allowed: typing.Iterable[Any]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        raise RecipeError(f"{key}: {value!r} is not one of {', '.join(map(str, allowed))}")


def _check_keys(
    data: Mapping[str, Any], cls: type, where: str, extra: tuple[str, ...] = ()
) -> None:
    allowed = [f.name for f in dataclasses.fields(cls)] + list(extra)
    for key in data:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RecipeError(
                f"{_join(where, key)}: no such key{hint} (allowed: {', '.join(sorted(allowed))})"
            )


def _build(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    _check_keys(data, cls, where)
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
        return _build(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where}: {value!r} is not a list")
        item = typing.get_args(kind)[0]
        return tuple(_convert(v, item, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecipeError(f"{where}: {value!r} is not of type {kind.__name__}")
    return value


def _plain(value: Any) -> Any:
    """Data as JSON has it; a whole number is an int, so that equal recipes look equal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


_GROUPED = Quantize(method="absmax", granularity="group")
_SPARSEGPT = Prune(method="sparsegpt")
_FULL = Adapter(method="full")

PRESETS = {
    "magnitude": Recipe(prune=Prune("magnitude"), quantize=_GROUPED, adapter=None),
    "wanda": Recipe(prune=Prune("wanda"), quantize=_GROUPED, adapter=None),
    "sparsegpt": Recipe(_SPARSEGPT, _GROUPED, adapter=None, solve=Solve("second-order")),
    "naive-lora": Recipe(adapter=Adapter(method="naive")),
    "slim": Recipe(),
    "slim-q": Recipe(adapter=Adapter(bits=4)),
    "full-lora": Recipe(adapter=_FULL),
    "joint": Recipe(_SPARSEGPT, adapter=_FULL, solve=Solve("joint")),
    "joint-q": Recipe(_SPARSEGPT, adapter=dataclasses.replace(_FULL, bits=4), solve=Solve("joint")),
}
"""magnitude, wanda and sparsegpt have no adapter and one scale per group; the others one scale per
tensor and rank 0.1. A name that ends in -q stores its adapters as int4, in groups of 128.
"""
