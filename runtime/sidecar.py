"""What travels beside a file of another format: manifest, tokenizer, golden outputs, and digests of
the files it belongs to.

    model.onnx          the program as its runtime reads it
    model.onnx.slimfx   safetensors: golden inputs and outputs; the rest as JSON in its metadata
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from slimfx.runtime import archive
from slimfx.runtime.golden import ordered
from slimfx.runtime.manifest import Manifest
from torch import Tensor

from slimfx.errors import ArtifactError

SUFFIX = ".slimfx"


@dataclass(frozen=True)
class Sidecar:
    """Read with `read`, which also looks whether the files are those it was written for."""

    target: str
    """The format: "onnx", "pte", "hf"."""
    manifest: Manifest
    record: Mapping[str, Any]
    """What the target wants to remember: plain JSON."""
    inputs: Mapping[str, Tensor]
    """Golden inputs by name, in call order."""
    outputs: Mapping[str, Tensor]
    """What the files answer to them, by name."""


def write(path: Path, sidecar: Sidecar, files: Sequence[Path]) -> None:
    """Write `path`, atomically.

    Args:
        files: all that the runtime reads, in the folder of `path`.
    """
    tensors = {f"input.{name}": tensor for name, tensor in sidecar.inputs.items()}
    tensors |= {f"output.{name}": tensor for name, tensor in sidecar.outputs.items()}
    metadata = {
        "target": sidecar.target,
        "manifest": sidecar.manifest.to_json(),
        "record": json.dumps(dict(sidecar.record), sort_keys=True),
        "order": json.dumps([list(sidecar.inputs), list(sidecar.outputs)]),
        "files": json.dumps({str(f.relative_to(path.parent)): _digest(f) for f in sorted(files)}),
    }
    if sidecar.manifest.tokenizer is not None:
        metadata["tokenizer"] = sidecar.manifest.tokenizer
    held = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    with archive.atomic(path) as part:
        part.write_bytes(ordered(safetensors.torch.save(held, metadata=metadata)))


def read(path: Path, target: str) -> Sidecar:
    """What `write` wrote.

    Raises:
        ArtifactError: missing or damaged sidecar, another target, or a file that is missing or has
            other bytes than when it was written.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        files = dict(json.loads(metadata["files"]))
        inputs, outputs = json.loads(metadata["order"])
        sidecar = Sidecar(
            target=metadata["target"],
            manifest=Manifest.from_json(metadata["manifest"], metadata.get("tokenizer")),
            record=dict(json.loads(metadata["record"])),
            inputs={name: tensors[f"input.{name}"] for name in inputs},
            outputs={name: tensors[f"output.{name}"] for name in outputs},
        )
    except (
        *(OSError, safetensors.SafetensorError, ValueError, LookupError, TypeError),
        *(RecursionError, AttributeError),
    ) as error:
        raise ArtifactError(
            f"{path}: not slimfx's record of a {target} export ({error}); it lies beside the "
            f"file, keep them together or export again"
        ) from error
    if sidecar.target != target:
        raise ArtifactError(f"{path}: belongs to a {sidecar.target} export, not to {target}")
    for name, digest in files.items():
        _check_file(path.parent, name, digest)
    return sidecar


def _check_file(folder: Path, name: str, digest: str) -> None:
    file = folder / name
    try:
        inside, there = file.resolve().is_relative_to(folder.resolve()), file.is_file()
    except (OSError, ValueError) as error:  # no name of a file at all
        raise ArtifactError(f"{folder}: its record names {name[:80]!r} ({error!r:.80})") from error
    if not inside:
        raise ArtifactError(f"{folder}: its record names {name}, which is outside")
    if not there:
        raise ArtifactError(f"{file}: missing; its record names it")
    if _digest(file) != digest:
        raise ArtifactError(f"{file}: damaged, its bytes are not those that were written")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
