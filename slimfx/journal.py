"""A journal of a compression: what is finished is on disk, and a killed job goes on from there.

    job.json                what it is a journal of; another job is refused
    block-3.safetensors     the compressed layers of a block
    live-3-0.safetensors    what later blocks read of a batch, behind the last finished block alone
    block-3.json            their reports, and that the block is finished: written last

Each file is written under another name, flushed and renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx.calibrate import Values
from slimfx.errors import JournalError
from slimfx.runtime import archive
from slimfx.runtime.manifest import LayerReport
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedLinear
from slimfx.runtime.unread import places, read, unread

Layers = dict[str, tuple[PackedLinear, LayerReport]]
"""The compressed layers of a block by name."""

_TYPES = {t.__name__: t for t in (Packed24, PackedBitmask, PackedDense, PackedLinear, LayerReport)}
_JOB = "job.json"
_RANDOM = "random state"


@dataclass(frozen=True)
class Journal:
    """A folder that no other process writes to."""

    folder: Path


@contextmanager
def opened(folder: str | Path) -> Iterator[Journal]:
    """A journal for the time of the block, gone after it unless an error left finished blocks.

    Raises:
        JournalError: another process has it open, or the folder cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise JournalError(f"{folder}: no journal can be kept there ({error.strerror})") from error
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(
                f"{folder}: another process is at work on it; wait for it, or write to another file"
            ) from error
        for part in folder.glob(".*.part"):
            part.unlink()
        journal, ended = Journal(folder), False
        try:
            yield journal
            ended = True
        finally:
            if ended or not finished(journal):
                (folder / _JOB).unlink(missing_ok=True)
                shutil.rmtree(folder)


def begin(journal: Journal, job: Mapping[str, Any]) -> None:
    """Say what job it is, or find that it is the one already begun.

    Raises:
        JournalError: it is another; names what differs.
    """
    path = journal.folder / _JOB
    if not path.exists():
        for stale in journal.folder.glob("*-*"):
            stale.unlink()
        _write(path, json.dumps(job, sort_keys=True).encode())
        return
    other = _json(path)
    job = json.loads(json.dumps(job))
    changed = sorted(key for key in {*job, *other} if job.get(key) != other.get(key))
    if changed:
        raise JournalError(
            f"{journal.folder}: holds an unfinished job of another {', '.join(changed)}; give the "
            f"same to go on with it, or remove the folder to begin anew"
        )


def finished(journal: Journal) -> int:
    """How many blocks are."""
    number = 0
    while (journal.folder / f"block-{number}.json").exists():
        number += 1
    return number


def write(journal: Journal, number: int, layers: Layers, batches: Iterable[Values]) -> None:
    """Finish a block: its layers, and for each batch the values that later blocks read."""
    values = []
    for i, each in enumerate(batches):
        live: dict[str, Tensor] = {}
        values.append({node.name: _plain(value, node.name, live) for node, value in each.items()})
        _write_tensors(_file(journal, f"live-{number}-{i}"), live)
    tensors = {_RANDOM: torch.get_rng_state()}
    described = {name: _plain(found, name, tensors) for name, found in layers.items()}
    _write_tensors(_file(journal, f"block-{number}"), tensors)
    marker = {"layers": described, "batches": values}
    _write(journal.folder / f"block-{number}.json", json.dumps(marker).encode())
    for passed in journal.folder.glob(f"live-{number - 1}-*"):
        passed.unlink()


def layers_of(journal: Journal, number: int) -> Layers:
    """The layers of a finished block, their tensors left unread.

    Raises:
        JournalError: the marker is damaged.
        ArtifactError: the tensors are.
    """
    tensors = _unread(journal, f"block-{number}")
    described = _json(journal.folder / f"block-{number}.json")["layers"]
    return {name: _built(each, tensors) for name, each in described.items()}


def batches_after(journal: Journal, number: int, program: ExportedProgram) -> list[Values]:
    """What later blocks read, left unread; random state is as when the block was finished.

    Raises:
        JournalError, ArtifactError: as `layers_of`.
    """
    torch.set_rng_state(read(_unread(journal, f"block-{number}")[_RANDOM]))
    nodes = {node.name: node for node in program.graph.nodes}
    batches = _json(journal.folder / f"block-{number}.json")["batches"]
    found = []
    for i, each in enumerate(batches):
        live = _unread(journal, f"live-{number}-{i}")
        found.append({nodes[name]: _built(value, live) for name, value in each.items()})
    return found


def digest(named: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors and their names, one in memory at a time."""
    sha = hashlib.sha256()
    for name, tensor in named.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = read(tensor).detach().cpu().contiguous().view(-1).view(torch.uint8)
        sha.update(flat.numpy().data)
    return sha.hexdigest()


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has it, its tensors put aside under names that begin with `name`."""
    if isinstance(value, Tensor):
        first = tuple(slice(1) if stride == 0 else slice(None) for stride in value.stride())
        core = value.detach()[first]  # of a dimension that repeats itself
        tensors[name] = core.clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "size": list(value.shape)}
    if is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        own = {part: _plain(v, f"{name} {part}", tensors) for part, v in parts.items()}
        return {"type": type(value).__name__, **own}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name} {i}", tensors) for i, item in enumerate(value)]
    return value


def _built(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_plain` was given."""
    if isinstance(data, list):
        return tuple(_built(item, tensors) for item in data)
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return tensors[data["tensor"]].expand(data["size"])
    kind = _TYPES[data["type"]]
    return kind(**{key: _built(v, tensors) for key, v in data.items() if key != "type"})


def _unread(journal: Journal, name: str) -> dict[str, Tensor]:
    found = places(_file(journal, name))
    return {key: unread(place, place.dtype) for key, place in found.items()}


def _file(journal: Journal, name: str) -> Path:
    return journal.folder / f"{name}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _write(path, safetensors.torch.save(tensors))


def _write(path: Path, data: bytes) -> None:
    with archive.atomic(path) as temporary:
        temporary.write_bytes(data)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JournalError(f"{path}: cannot be read ({error}); remove its folder") from error
