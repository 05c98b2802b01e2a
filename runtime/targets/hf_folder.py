"""A folder that takes its place whole: written beside it, then renamed."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors

from slimfx.errors import ArtifactError


@contextmanager
def new_folder(path: Path, sidecar: str, target: str) -> Iterator[Path]:
    """A temporary folder that becomes `path` only if the block ends without an error.

    Args:
        sidecar: the name of the file by which a folder of `target` is known.

    Raises:
        ArtifactError: `path` is a file, or a folder with anything that slimfx did not write.
    """
    check_place(path, sidecar, target)
    path = path.resolve()  # of a link, the folder it names is replaced
    mark = uuid.uuid4().hex
    temporary, old = path.parent / f".{mark}.part", path.parent / f".{mark}.old"
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise ArtifactError(f"{path}: not written, {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_place(path: Path, sidecar: str, target: str) -> None:
    """Refuse to replace what slimfx did not write; arguments as those of `new_folder`.

    Raises:
        ArtifactError: as `new_folder`.
    """
    if not path.parent.is_dir():
        raise ArtifactError(f"{path}: no such folder {path.parent}")
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(f"{path}: is a file; give the name of a folder")
    held = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    foreign = sorted(held - _written(path / sidecar, target))
    if foreign:
        raise ArtifactError(
            f"{path}: holds {foreign[0]}, which slimfx did not write there; give a new folder"
        )


def _written(sidecar: Path, target: str) -> set[str]:
    """The files that a sidecar vouches for, itself included; none if it is not one of `target`."""
    try:
        with safetensors.safe_open(sidecar, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("target") != target:
            return set()
        return {sidecar.name, *json.loads(metadata["files"])}
    except (OSError, safetensors.SafetensorError, ValueError, LookupError, TypeError):
        return set()
