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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
import torch
from torch import Tensor
from torch.export import ExportedProgram

from slimfx.calibrate import Values
from slimfx.errors import JournalError
from slimfx.plain import built, plain
from slimfx.ranks import ALONE, Ranks
from slimfx.runtime import archive
from slimfx.runtime.manifest import LayerReport
from slimfx.runtime.pack import PackedLinear
from slimfx.runtime.unread import places, read, unread

Layers = dict[str, tuple[PackedLinear, LayerReport]]
"""The compressed layers of a block by name."""

_JOB = "job.json"


@dataclass(frozen=True)
class Journal:
    """A folder that no other process writes to."""

    folder: Path


@contextmanager
def opened(folder: str | Path, ranks: Ranks = ALONE) -> Iterator[Journal]:
    """A journal for the time of the block, gone after it unless an error left finished blocks.

    Raises:
        JournalError: another job has it open, or the folder cannot be made.
    """
    journal = Journal(Path(folder))
    if ranks.own:  # the first process has the lock for all
        ranks.told(0, None)
        yield journal
        return
    try:
        lock = _locked(journal)
    except JournalError as error:
        ranks.told(0, error)
        raise
    ranks.told(0, None)
    ended = False
    try:
        yield journal
        ended = True
    finally:
        if ended or not finished(journal):
            (journal.folder / _JOB).unlink(missing_ok=True)
            shutil.rmtree(journal.folder)
        lock.close()


def _locked(journal: Journal) -> TextIO:
    """The open lock of a folder in order."""
    folder = journal.folder
    try:
        folder.mkdir(exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise JournalError(f"{folder}: no journal can be kept there ({error.strerror})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise JournalError(
            f"{folder}: another process is at work on it; wait for it, or write to another file"
        ) from error
    for part in folder.glob(".*.part"):
        part.unlink()
    return lock


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


def keep_live(
    journal: Journal, number: int, batches: Iterable[tuple[int, Values]]
) -> dict[str, Any]:
    """Write what later blocks read of each batch; returns what `write` is to say of it."""
    described = {}
    for i, each in batches:
        live: dict[str, Tensor] = {}
        described[str(i)] = {n.name: plain(value, n.name, live) for n, value in each.items()}
        _write_tensors(_file(journal, f"live-{number}-{i}"), live)
    return described


def write(journal: Journal, number: int, layers: Layers, batches: Mapping[str, Any]) -> None:
    """Finish a block: its layers, and what `keep_live` said of each batch."""
    tensors: dict[str, Tensor] = {}
    described = {name: plain(found, name, tensors) for name, found in layers.items()}
    _write_tensors(_file(journal, f"block-{number}"), tensors)
    marker = {"layers": described, "batches": batches}
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
    return {name: built(each, tensors) for name, each in described.items()}


def batches_after(
    journal: Journal, number: int, program: ExportedProgram, numbers: Iterable[int]
) -> dict[int, Values]:
    """What later blocks read of some batches, left unread.

    Raises:
        JournalError, ArtifactError: as `layers_of`.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    batches = _json(journal.folder / f"block-{number}.json")["batches"]
    found = {}
    for i in numbers if batches else ():
        live = _unread(journal, f"live-{number}-{i}")
        found[i] = {nodes[name]: built(v, live) for name, v in batches[str(i)].items()}
    return found


def digest(named: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors and their names, one in memory at a time."""
    sha = hashlib.sha256()
    for name, tensor in named.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = read(tensor).detach().cpu().contiguous().view(-1).view(torch.uint8)
        sha.update(flat.numpy().data)
    return sha.hexdigest()


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
