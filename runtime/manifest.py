"""What an artifact says of itself: how it was made, what each layer cost, how to read its text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.export import ExportedProgram

from slimfx.errors import ArtifactError

FORMAT = (1, 2)
"""Major changes are refused by older readers, minor ones only add keys."""

_KEY = "slimfx"


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer as it is stored."""

    name: str
    out_features: int
    in_features: int
    layout: str
    rank: int
    bytes: int
    tokens: int
    """Calibration tokens its statistics come from, padding left out."""
    snr: float
    """Output signal to noise in dB for uncorrelated inputs."""
    snr_without_adapter: float
    clipped: float
    notes: tuple[str, ...] = ()
    """What was out of the ordinary, and the rule that was followed."""
    spectrum: tuple[float, ...] = ()
    """Of the error without the adapter, the share that an eighth, a quarter, half and all of the
    adapter's rank take up, inputs taken as uncorrelated; empty without one."""


@dataclass(frozen=True)
class Manifest:
    """Travels with a program in memory and inside its file."""

    form: str = "op"
    """How the file stores the compressed linears: "op" or "aten"."""
    recipe: Mapping[str, Any] | None = None
    layers: tuple[LayerReport, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Layer -> why it was left as it is."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """Samples, tokens and SHA-256 of the calibration data."""
    versions: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    """A `tokenizers` JSON document."""
    eos_token: int | None = None
    model_files: Mapping[str, Any] = field(default_factory=dict)
    """Name -> content of the JSON files beside the weights of a Hugging Face model."""

    def to_json(self) -> str:
        """Everything but the tokenizer, with sorted keys."""
        data = dataclasses.asdict(dataclasses.replace(self, tokenizer=None))
        return json.dumps({"format": list(FORMAT), **data}, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str, tokenizer: str | None) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: not JSON of this format, or of a newer major version.
        """
        try:
            data = json.loads(text)
            version = tuple(data.pop("format"))
            if version[0] != FORMAT[0]:
                raise ArtifactError(
                    f"the artifact has format {version[0]}, this slimfx reads {FORMAT[0]}; "
                    f"install the slimfx that wrote it ({data.get('versions')})"
                )
            layers = tuple(LayerReport(**_known(LayerReport, row)) for row in data["layers"])
            return cls(**{**_known(cls, data), "layers": layers, "tokenizer": tokenizer})
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"the artifact's manifest is damaged: {error}") from error


_KINDS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
    "Mapping[str, Any]": dict,
    "Mapping[str, str]": dict,
    "Mapping[str, Any] | None": (dict, type(None)),
    "tuple[str, ...]": list,
    "tuple[float, ...]": list,
    "tuple[LayerReport, ...]": list,
}

_PARTS: dict[str, Any] = {"tuple[str, ...]": str, "tuple[float, ...]": (int, float)}


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys this version knows, each of the type it should have."""
    found = {}
    for item in dataclasses.fields(cls):
        if item.name in data:
            value = data[item.name]
            if not isinstance(value, _KINDS[str(item.type)]):
                raise TypeError(f"{item.name} is {value!r}")
            if item.type in _PARTS:
                if not all(isinstance(part, _PARTS[str(item.type)]) for part in value):
                    raise TypeError(f"{item.name} is {value!r}")
                value = tuple(value)
            found[item.name] = value
    return found


def manifest_of(program: ExportedProgram) -> Manifest:
    """The manifest a program carries; an empty one for a program that slimfx has not seen."""
    return program.graph_module.meta.get(_KEY, Manifest())


def attach(program: ExportedProgram, manifest: Manifest) -> ExportedProgram:
    """Let a program that slimfx made carry a manifest; returns the same program."""
    program.graph_module.meta[_KEY] = manifest
    return program
