"""Unread tensors in `.pt2` archives: written without ever being held, and left in the file again.

torch is given a stand-in of one element for each of them; its table of weights is then corrected,
and the record filled from where the tensor is. To leave tensors in a file, torch is given one
without records, its table saying that all are on the meta device.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from slimfx.passes.base import with_state
from slimfx.runtime.archive import start_of
from slimfx.runtime.unread import Place, place_of, put
from torch import Tensor
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE
from torch.export import ExportedProgram

_FOLDER = "data/weights/"
_TABLE = f"{_FOLDER}model_weights_config.json"


def left(program: ExportedProgram) -> dict[str, Tensor]:
    """The unread tensors of a program."""
    return {name: tensor for name, tensor in program.state_dict.items() if place_of(tensor)}


def with_stand_ins(program: ExportedProgram, *, whole: bool = False) -> ExportedProgram:
    """The program with other tensors for the unread ones, which share memory like them.

    `whole`: of the same shapes, in memory that takes none until it is touched.
    """
    made: dict[Place, Tensor] = {}
    found = {}
    for name, tensor in left(program).items():
        place = place_of(tensor)
        assert place is not None
        shape = place.shape if whole else (1,)
        base = made.setdefault(place, torch.empty(shape, dtype=tensor.dtype))
        layout = (tensor.shape, tensor.stride(), tensor.storage_offset())
        view = base.as_strided(*layout) if whole else base[:]
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        found[name] = torch.nn.Parameter(view, tensor.requires_grad) if is_parameter else view
    return with_state(program, found)


def records(file: IO[bytes], unread: Mapping[str, Tensor]) -> dict[str, bytes | Tensor]:
    """What the table and the weights of an archive of stand-ins should be."""
    if not unread:
        return {}
    table = _table(file)
    found: dict[str, bytes | Tensor] = {}
    for name, tensor in unread.items():
        entry = table["config"][name]
        entry["tensor_meta"] |= {
            "sizes": [{"as_int": size} for size in tensor.shape],
            "strides": [{"as_int": stride} for stride in tensor.stride()],
            "storage_offset": {"as_int": tensor.storage_offset()},
        }
        found[_FOLDER + entry["path_name"]] = tensor
    return {**found, _TABLE: json.dumps(table).encode()}


def emptied(file: IO[bytes]) -> dict[str, bytes | Tensor]:
    """The table and the weights of an archive from which torch loads no weight."""
    table = _table(file)
    for entry in table["config"].values():
        entry["tensor_meta"]["device"] = {"type": "meta", "index": None}
    weights = {_FOLDER + entry["path_name"]: b"" for entry in table["config"].values()}
    return {**weights, _TABLE: json.dumps(table).encode()}


def leave_(program: ExportedProgram, path: Path) -> None:
    """Tell the tensors of a program that was loaded without weights where in its file they are."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = {e.filename.partition("/")[2]: e for e in archive.infolist()}
        for name, entry in _table(file)["config"].items():
            dtype = _SERIALIZE_TO_TORCH_DTYPE[entry["tensor_meta"]["dtype"]]
            record = entries[_FOLDER + entry["path_name"]]
            count = record.file_size // dtype.itemsize
            put(
                program.state_dict[name],
                Place(path, name, start_of(archive, record), dtype, (count,)),
            )


def _table(file: IO[bytes]) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        root = archive.namelist()[0].partition("/")[0]
        return json.loads(archive.read(f"{root}/{_TABLE}"))
