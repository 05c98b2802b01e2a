"""The recipe: what to do with each linear, as frozen data that round-trips through YAML."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slimfx.errors import RecipeError
from slimfx.parse import build, changed, check_keys, plain
from slimfx.steps import (
    Adapter,
    Inputs,
    LayerRecipe,
    Override,
    Prune,
    Quantize,
    Solve,
    Target,
    Transform,
    Tune,
    at_least,
    one_of,
)

_LONGEST, _DEEPEST = 1 << 18, 32
"""Characters of a recipe, and lists and mappings within one another."""
_STEPS = {
    "prune": Prune,
    "quantize": Quantize,
    "adapter": Adapter,
    "solve": Solve,
    "transform": Transform,
    "inputs": Inputs,
}
"""The keys that an override may change for a layer."""


@dataclass(frozen=True)
class Calibration:
    """How many samples of which length feed the statistics."""

    samples: int = 64
    length: int = 512
    """Tokens of a sample; a program whose range ends earlier gets its own longest length."""
    batch: int = 8
    """Samples that go through a block together; changes memory, not the result's meaning."""
    seed: int = 0
    activations: str = "exact"
    """How what one block hands to the next is kept: "exact", or "bfloat16" in half the bytes."""
    min_coverage: float = 1.0
    """The share of the layers that some token must reach: experts that are never chosen are
    compressed as if all their inputs mattered alike."""

    def __post_init__(self) -> None:
        for name in ("samples", "length", "batch"):
            at_least(f"calibration.{name}", getattr(self, name), 1)
        one_of("calibration.activations", self.activations, ("exact", "bfloat16"))
        if not 0 <= self.min_coverage <= 1:
            raise RecipeError(
                f"calibration.min_coverage: {self.min_coverage} is not a share, from 0 to 1"
            )


@dataclass(frozen=True)
class Recipe:
    """Everything `slimfx.compress` needs to know; equal recipes give equal files."""

    prune: Prune | None = field(default_factory=Prune)
    quantize: Quantize | None = field(default_factory=Quantize)
    adapter: Adapter | None = field(default_factory=Adapter)
    solve: Solve = field(default_factory=Solve)
    transform: Transform | None = None
    inputs: Inputs | None = None
    tune: Tune | None = None
    """For whole blocks, so that no override changes it."""
    embeddings: int | None = None
    """Bits of the embedding tables: 16 is bfloat16, 8 codes with a scale for each row, which a head
    tied to the table multiplies with, too; null leaves them as they are."""
    calibration: Calibration = field(default_factory=Calibration)
    skip: tuple[str, ...] = ("lm_head",)
    """Patterns of layers to leave as they are (see `matches`)."""
    overrides: tuple[Override, ...] = ()
    """The last matching one wins, key by key."""
    budget: Target | None = None
    """What `compress` searches first: layouts, ranks and bits of adapters, layer by layer."""

    def __post_init__(self) -> None:
        one_of("embeddings", self.embeddings, (None, 8, 16))
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
        return LayerRecipe(**{key: getattr(self, key) for key in _STEPS}, tune=self.tune)

    @staticmethod
    def _apply(layer: LayerRecipe, override: Override) -> LayerRecipe:
        where = f"overrides[{override.match}]"
        if override.solve is None:
            raise RecipeError(f"{where}.solve: null is not allowed; add the layer to skip")
        steps = {
            key: changed(getattr(layer, key), getattr(override, key), step, f"{where}.{key}")
            for key, step in _STEPS.items()
        }
        return LayerRecipe(**steps, tune=layer.tune)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every key present, the canonical form."""
        return plain(dataclasses.asdict(self))

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
        check_keys(own, cls, "", extra=("preset",))
        for key, value in own.items():
            if isinstance(value, Mapping) and isinstance(base[key], dict):
                base[key] = {**base[key], **value}
            else:
                base[key] = value
        return build(cls, base, "")

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Parse YAML (safe subset: no object tags, no references)."""
        try:
            _look_at(text)
            data = yaml.safe_load(text)
            return cls.from_dict({} if data is None else data)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"the recipe is not valid YAML: {error}") from error

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A recipe by name, one of `PRESETS`."""
        one_of("preset", name, PRESETS)
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


def _look_at(text: str) -> None:
    """Refuse a text that is small and becomes large, or takes long to read."""
    if len(text) > _LONGEST:
        raise RecipeError(f"the recipe has {len(text)} characters, more than {_LONGEST}")
    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError("the recipe is not valid YAML here: *name is not read, write it out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise RecipeError(f"the recipe is more than {_DEEPEST} lists or mappings deep")


def matches(name: str, pattern: str) -> bool:
    """Does a pattern (* ? [] as in a shell) match a dotted name, or the end of it after a dot?"""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


_GROUPED = Quantize(method="absmax", granularity="group")
_SPARSEGPT = Prune(method="sparsegpt")
_FULL = Adapter(method="full")
_JOINT = Solve("joint", correct_bias=True)
_LPLR = Adapter(method="lplr", bits=4)

PRESETS = {
    # one step alone
    "magnitude": Recipe(prune=Prune("magnitude"), quantize=_GROUPED, adapter=None),
    "wanda": Recipe(prune=Prune("wanda"), quantize=_GROUPED, adapter=None),
    "jsq": Recipe(prune=Prune("jsq"), quantize=_GROUPED, adapter=None),
    "sparsegpt": Recipe(_SPARSEGPT, _GROUPED, adapter=None, solve=Solve("second-order")),
    "absmax": Recipe(prune=None, quantize=_GROUPED, adapter=None),
    "optq": Recipe(None, _GROUPED, adapter=None, solve=Solve("second-order")),
    "awq": Recipe(None, _GROUPED, adapter=None, transform=Transform("awq")),
    "omniquant": Recipe(None, _GROUPED, adapter=None, tune=Tune("clipping", rate=0.1)),
    "affinequant": Recipe(None, _GROUPED, adapter=None, tune=Tune("affine", rate=0.03)),
    "smoothquant": Recipe(
        None, _GROUPED, adapter=None, transform=Transform("smoothquant"), inputs=Inputs("fp8")
    ),
    # SLiM and what it compares adapters with
    "naive-lora": Recipe(adapter=Adapter(method="naive")),
    "l2qer": Recipe(adapter=Adapter(method="l2qer")),
    "qera": Recipe(adapter=Adapter(method="qera")),
    "slim": Recipe(),
    "slim-o": Recipe(transform=Transform("slim-quant-o")),
    "slim-q": Recipe(adapter=Adapter(bits=4)),
    # decompositions that alternate
    "losparse": Recipe(
        adapter=Adapter(method="naive"), solve=Solve("alternate", rounds=1, low_rank_first=True)
    ),
    "lq-lora": Recipe(
        None, adapter=Adapter(method="naive"), solve=Solve("alternate", low_rank_first=True)
    ),
    "oats": Recipe(
        Prune(sparsity=0.5),
        quantize=None,
        adapter=Adapter(method="qera"),
        solve=Solve("alternate", rounds=20, low_rank_first=True),
    ),
    "caldera": Recipe(None, adapter=_LPLR, solve=Solve("alternate", weight="second-order")),
    # against the whole covariance
    "full-lora": Recipe(adapter=_FULL),
    "joint": Recipe(_SPARSEGPT, adapter=_FULL, solve=_JOINT),
    "joint-q": Recipe(_SPARSEGPT, adapter=_LPLR, solve=_JOINT),
}
"""Presets without an adapter have one scale per group of 128; the others one scale per tensor and
rank 0.1. A name that ends in -q stores its adapters as int4, in groups of 128.
"""
