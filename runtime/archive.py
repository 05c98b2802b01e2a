"""Reading and writing `.pt2` archives: look before torch loads, write the same bytes every time.

torch.export.load unpickles whatever an archive marks as pickled, and retries sample inputs without
`weights_only`. `inspect` therefore refuses such files before torch sees them. `rewrite` turns what
torch.export.save wrote into an archive that holds tensors, JSON and nothing else: no pickle, no
time stamps, no paths of the machine it was made on.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import IO, Any

import torch
from slimfx.runtime.unread import place_of
from slimfx.runtime.untrusted import check_graph, check_table, parsed

from slimfx.errors import ArtifactError

ROOT = "model"
OWN = "slimfx/"
"""Folder of slimfx's own records; torch does not look at it."""

_JSON_LIMIT = 1 << 30
_RATIO_LIMIT = 200
_DESCRIPTOR = 24  # bytes that may follow a record's data
_WEIGHTS = "data/weights/"
_CONSTANTS = "data/constants/"
_SAMPLES = "data/sample_inputs/"
_KNOWN = re.compile(
    r"(archive_format|archive_version|byteorder|\.data/\w+|models/[\w.-]+\.json"
    r"|data/weights/(weight_\d+|[\w.-]+\.json)|data/constants/(tensor_\d+|[\w.-]+\.json)"
    r"|data/sample_inputs/[\w.-]+\.pt|extra/.+|slimfx/[\w.-]+)"
)


def inspect(file: IO[bytes], name: str) -> dict[str, bytes]:
    """Refuse a `.pt2` that is damaged or would make torch run code; return slimfx's own records.

    Raises:
        ArtifactError: not a zip, truncated, flipped bytes, unknown or unsafe records.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = _records(archive, name)
            _check_contents(archive, records, name)
            own = {k[len(OWN) :]: archive.read(v) for k, v in records.items() if k.startswith(OWN)}
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error, NotImplementedError) as error:
        raise ArtifactError(f"{name}: not a complete .pt2 archive ({error})") from error
    except (RuntimeError, ValueError, struct.error) as error:  # encrypted, or negative places
        raise ArtifactError(f"{name}: not a readable .pt2 archive ({error})") from error
    if damaged is not None:
        raise ArtifactError(f"{name}: record {damaged} is damaged (checksum differs)")
    file.seek(0)
    return own


def _records(archive: zipfile.ZipFile, name: str) -> dict[str, zipfile.ZipInfo]:
    """Record -> entry, without the root folder."""
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        _, _, record = entry.filename.partition("/")
        if ".." in entry.filename.split("/") or not _KNOWN.fullmatch(record):
            raise ArtifactError(
                f"{name}: record {entry.filename!r} does not belong in an exported program; "
                f"slimfx loads programs of plain tensors only"
            )
        if record in found:
            raise ArtifactError(f"{name}: record {record} appears twice")
        if entry.file_size > _RATIO_LIMIT * entry.compress_size + (1 << 20):
            raise ArtifactError(
                f"{name}: record {record} claims {entry.file_size} bytes from {entry.compress_size}"
            )
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArtifactError(f"{name}: record {record} is packed in an unusual way")
        if entry.flag_bits & 1 or entry.external_attr & 0x10 or entry.is_dir():
            raise ArtifactError(f"{name}: record {record} is encrypted, or a folder")
        found[record] = entry
    if not any(record.startswith("models/") for record in found):
        raise ArtifactError(f"{name}: holds no exported program")
    _check_places(archive, list(found.values()), name)
    return found


def _check_places(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], name: str) -> None:
    """Records lie side by side from the first byte to the directory: nothing else is hidden."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if not end <= entry.header_offset <= end + _DESCRIPTOR:
            raise ArtifactError(f"{name}: record {entry.filename} overlaps another, or hides bytes")
        end = start_of(archive, entry) + entry.compress_size
    if not end <= archive.start_dir <= end + _DESCRIPTOR:
        raise ArtifactError(f"{name}: the archive hides bytes before its directory")


def start_of(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """The first byte of a record's data in the file."""
    assert archive.fp is not None
    archive.fp.seek(entry.header_offset + 26)
    return entry.header_offset + 30 + sum(struct.unpack("<HH", archive.fp.read(4)))


def _check_contents(
    archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo], name: str
) -> None:
    for record, entry in records.items():
        what = f"{name}: {record}"
        if record.endswith(".json") and entry.file_size > _JSON_LIMIT:
            raise ArtifactError(f"{what} has {entry.file_size} bytes, more than {_JSON_LIMIT}")
        if record.startswith("models/"):
            check_graph(parsed(archive.read(entry), what), what)
        elif record.startswith((_WEIGHTS, _CONSTANTS)) and record.endswith(".json"):
            folder = record[: record.rindex("/") + 1]
            sizes = {
                r[len(folder) :]: e.file_size for r, e in records.items() if r.startswith(folder)
            }
            check_table(parsed(archive.read(entry), what), what, sizes.get)
        elif record.startswith(_SAMPLES):
            _check_samples(archive.read(entry), name)


def _check_samples(data: bytes, name: str) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except (UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"{name}: the sample inputs are a pickle that weights_only refuses; save the program "
            f"with example inputs of plain tensors"
        ) from error


def rewrite(
    source: IO[bytes],
    target: IO[bytes],
    own: Mapping[str, bytes],
    instead: Mapping[str, bytes | torch.Tensor] = MappingProxyType({}),
) -> None:
    """Copy an archive of torch.export.save to `target`, reproducible and without pickles.

    JSON is deflated, tensors are stored; stack traces, sample inputs and the serialization id are
    left out. `instead`: what some records shall hold, an unread tensor for instance.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            _, _, record = entry.filename.partition("/")
            if record == ".data/serialization_id":
                continue
            if record in instead:
                _write(new, record, instead[record])
                continue
            data = b"" if record.startswith(_SAMPLES) else old.read(entry)
            if record.startswith("models/"):
                data = json.dumps(_without_traces(json.loads(data)), separators=(",", ":")).encode()
            _write(new, record, data)
        for record, data in own.items():
            _write(new, OWN + record, data)


def _write(archive: zipfile.ZipFile, record: str, data: bytes | torch.Tensor) -> None:
    entry = zipfile.ZipInfo(f"{ROOT}/{record}", (1980, 1, 1, 0, 0, 0))
    packed = record.endswith(".json")
    entry.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    entry.external_attr = 0o644 << 16
    if isinstance(data, bytes):
        archive.writestr(entry, data)
        return
    place = place_of(data)
    assert place is not None, f"{record} has no place"
    entry.file_size = torch.Size(place.shape).numel() * data.itemsize
    with archive.open(entry, "w") as file:
        for part in place.parts(data.dtype):
            file.write(part.view(torch.uint8).numpy().data)


def _without_traces(value: Any) -> Any:
    """Node metadata keeps the module stack; traces hold paths and would make equal programs
    differ.
    """
    if isinstance(value, list):
        return [_without_traces(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _without_traces(item) for key, item in value.items()}
    metadata = kept.get("metadata")
    if "target" in kept and isinstance(metadata, dict):
        kept["metadata"] = {k: v for k, v in metadata.items() if k == "nn_module_stack"}
    return kept


class Sink(io.RawIOBase):
    """A file for torch's writer, which aborts the process when a write fails.

    A failure is kept for `finish`, and what follows it goes nowhere.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._failure: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As the file does."""
        return self._file.seek(offset, whence)

    def write(self, data: Any) -> int:
        """As the file does, until it fails."""
        if self._failure is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._failure = error
        return len(data)

    def finish(self) -> None:
        """Raise what went wrong, or put the reading position at the start."""
        if self._failure is not None:
            raise self._failure
        self._file.seek(0)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block ends without an error.

    Raises:
        ArtifactError: the folder is missing or the disk is full; an older file at `path` is intact.
    """
    if not path.parent.is_dir():
        raise ArtifactError(f"{path}: no such folder {path.parent}")
    temporary = path.parent / f".{uuid.uuid4().hex}.part"
    try:
        yield temporary
        temporary.chmod(_mode(path))
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "no space left" if full else error.strerror or str(error)
        kept = "; the older file is intact" if os.path.exists(path) else ""  # noqa: PTH110  no raise
        raise ArtifactError(f"{path}: not written, {reason}{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Give a finished file of the same file system its place, for good."""
    source.chmod(_mode(target))
    source.replace(target)
    _flush(target.parent)


def _mode(path: Path) -> int:
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
