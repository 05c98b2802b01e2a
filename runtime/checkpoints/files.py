"""The files of a Hugging Face folder: JSON, and safetensors in one file or in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from slimfx.errors import ArtifactError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The mapping of a JSON file.

    Raises:
        ArtifactError: missing, or no JSON mapping.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: is no JSON mapping")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        ArtifactError: missing or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise ArtifactError(f"{path}: no safetensors file ({error})") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder.

    Raises:
        ArtifactError: no safetensors, a missing shard, or an index that points elsewhere.
    """
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE)
    if not (folder / INDEX).is_file():
        held = sorted(file.name for file in folder.glob("*.bin"))
        why = f"it has {held[0]}, a pickle" if held else "no weights"
        raise ArtifactError(
            f"{folder}: no {SINGLE} ({why}); load it where it was made and save it again with "
            f"model.save_pretrained(folder), which writes safetensors"
        )
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ArtifactError(f"{folder / INDEX}: has no weight_map of file names")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ArtifactError(f"{folder / INDEX}: names {name}, which is outside the folder")
        tensors |= read_safetensors(folder / name)
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise ArtifactError(f"{folder}: {missing[0]} is in the index and in no file")
    return tensors
