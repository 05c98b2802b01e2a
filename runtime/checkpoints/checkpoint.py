"""A compressed checkpoint of another library: which one it is, its linears, and all else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimfx.runtime import sidecar
from slimfx.runtime.checkpoints.adapter import read_adapter
from slimfx.runtime.checkpoints.files import read_json, read_weights
from slimfx.runtime.checkpoints.gptq import read_gptq
from slimfx.runtime.checkpoints.linears import ForeignLinear, Found, as_mapping, stored_floats
from slimfx.runtime.checkpoints.pack_quantized import read_pack_quantized
from slimfx.runtime.checkpoints.slim import read_slim
from slimfx.runtime.manifest import Manifest
from slimfx.runtime.pack import PackedLinear
from slimfx.runtime.targets import hf
from torch import Tensor

from slimfx.errors import ArtifactError

_READERS = {
    "compressed-tensors": read_pack_quantized,
    "gptq": read_gptq,
    "slim": read_slim,
}


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds."""

    kind: str
    """Who wrote it: "compressed-tensors", "gptq" or "slim"."""
    config: Mapping[str, Any]
    """config.json, without what it says of quantization."""
    linears: Mapping[str, ForeignLinear]
    """Module of the model -> its compressed form."""
    parameters: Mapping[str, Tensor]
    """Every other tensor, by its name in the model."""
    manifest: Manifest | None
    """Of a folder that slimfx exported: how it was made."""
    notes: tuple[str, ...]
    """What is not as it was in the folder."""


def read_checkpoint(folder: Path, adapter: Path | None = None) -> Checkpoint:
    """Look at a folder and read it.

    Args:
        adapter: a PEFT folder; by default `folder`/adapter, where there is one.

    Raises:
        ArtifactError: missing or damaged files, a format that is none of the known ones, or weights
            that slimfx's layouts cannot express.
    """
    config = read_json(folder / "config.json")
    own = folder / hf.SIDECAR
    manifest = sidecar.read(own, hf.TARGET).manifest if own.is_file() else None
    kind, settings = _kind(folder, config)
    tensors = read_weights(folder)
    try:
        found = _READERS[kind](settings, tensors) if kind else Found({}, frozenset())
        parameters = {name: t for name, t in tensors.items() if name not in found.used}
        place = adapter or folder / hf.ADAPTER
        if adapter is not None or place.is_dir():
            found, parameters = _with_adapters(found, parameters, place)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    if not found.linears:
        raise ArtifactError(
            f"{folder}: config.json has no quantization_config, and there is no args.json or "
            f"adapter: not a compressed checkpoint. Read it with slimfx.capture"
        )
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return Checkpoint(
        kind=kind or "peft",
        config=plain,
        linears=found.linears,
        parameters=parameters,
        manifest=None if adapter is not None else manifest,
        notes=(*_notes(found), *found.notes),
    )


def _kind(folder: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The reader's name, "" for plain weights, and its settings."""
    if "quantization_config" in config:
        settings = as_mapping(config["quantization_config"], "quantization_config")
        kind = settings.get("quant_method")
        if kind not in ("compressed-tensors", "gptq"):
            raise ArtifactError(
                f"{folder}: quant_method {kind!r} is not one that slimfx reads "
                f"(compressed-tensors, gptq); dequantize it and use slimfx.capture"
            )
        return str(kind), settings
    if (folder / "quantize_config.json").is_file():
        return "gptq", read_json(folder / "quantize_config.json")
    if (folder / "args.json").is_file():
        return "slim", read_json(folder / "args.json")
    return "", {}


def _with_adapters(
    found: Found, parameters: Mapping[str, Tensor], folder: Path
) -> tuple[Found, dict[str, Tensor]]:
    """The linears with the adapters of a PEFT folder; weights of floats that have one join them."""
    linears, rest = dict(found.linears), dict(parameters)
    for name, (L, R) in read_adapter(folder).items():
        if name not in linears and f"{name}.weight" in rest:
            weight = rest.pop(f"{name}.weight")
            N, K = weight.shape
            linears[name] = ForeignLinear(PackedLinear(stored_floats(name, weight)), (N, K))
        if name not in linears:
            raise ArtifactError(f"{folder}: adapts {name}, which has no weight in the checkpoint")
        packed, (N, K) = linears[name].packed, linears[name].shape
        if packed.L is not None:
            raise ArtifactError(f"{folder}: adapts {name}, which has an adapter already")
        if L.shape[1] != K or R.shape[0] != N:
            raise ArtifactError(
                f"{folder}: adapts {name} from {L.shape[1]} inputs to {R.shape[0]} outputs; it has "
                f"{K} and {N}"
            )
        linears[name] = replace(linears[name], packed=replace(packed, L=L, R=R))
    return replace(found, linears=linears), rest


def _notes(found: Found) -> list[str]:
    changes = {name: linear.change for name, linear in found.linears.items() if linear.change}
    if not changes:
        return []
    worst = max(changes, key=lambda name: changes[name])
    return [
        f"scales of {len(changes)} layers are rounded to bfloat16, which changes them by "
        f"{changes[worst]:.2g} of themselves at most ({worst})"
    ]
