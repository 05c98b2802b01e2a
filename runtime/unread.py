"""Tensors that stay in a file until they are needed.

An unread tensor is on the meta device, and its storage knows its place in a file. Views and other
names of it share the storage and so the place; ops refuse it, `read` makes a tensor of it.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError

_MMAP_THRESHOLD = -3
"""The name of that setting in malloc.h."""
_PART = 1 << 22
"""Elements read at once."""
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn},
}


@dataclass(frozen=True)
class Place:
    """Elements that follow one another in a file."""

    path: Path
    name: str
    """Of the tensor there."""
    offset: int
    """Bytes in front of them."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    def parts(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The elements as `dtype`, a few megabytes [n] at a time.

        Raises:
            ArtifactError: the file is gone, cannot be read, or ends too soon.
        """
        count = torch.Size(self.shape).numel()
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                for start in range(0, count, _PART):
                    part = torch.empty(min(_PART, count - start), dtype=self.dtype)
                    if file.readinto(part.view(torch.uint8).numpy().data) != part.nbytes:
                        raise ArtifactError(f"{self.path}: ends within {self.name}")
                    yield part.to(dtype)
        except OSError as error:
            raise ArtifactError(
                f"{self.path}: {self.name} cannot be read ({error.strerror})"
            ) from error


def put(tensor: Tensor, place: Place) -> Tensor:
    """The same tensor, its storage's place known."""
    tensor.untyped_storage().place = place  # type: ignore[attr-defined]
    return tensor


def place_of(tensor: Tensor) -> Place | None:
    """Where the elements of its storage are; None for a tensor that was not left in a file."""
    return getattr(tensor.untyped_storage(), "place", None)


def unread(place: Place, dtype: torch.dtype) -> Tensor:
    """A tensor of the place's shape that is left where it is."""
    return put(torch.empty(place.shape, dtype=dtype, device="meta"), place)


def read(tensor: Tensor) -> Tensor:
    """The tensor itself, or what the file holds if it is unread.

    Raises:
        ArtifactError: the file cannot be read.
    """
    place = place_of(tensor) if tensor.is_meta else None
    if place is None:
        return tensor
    flat = torch.empty(torch.Size(place.shape).numel(), dtype=tensor.dtype)
    start = 0
    for part in place.parts(tensor.dtype):
        flat[start : start + len(part)] = part
        start += len(part)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def read_value(value: Any) -> Any:
    """`read` for a tensor, and anything else as it is."""
    return read(value) if isinstance(value, Tensor) else value


def left_unread(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the meta device in the place of those whose storage has one; all that shared a
    storage still do.
    """
    bases: dict[Place, Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        place = place_of(tensor)
        if place is not None:
            base = bases.setdefault(place, unread(place, tensor.dtype))
            view = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            tensor = torch.nn.Parameter(view, tensor.requires_grad) if is_parameter else view
        found[name] = tensor
    return found


def places(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file.

    Raises:
        ArtifactError: missing or damaged file, or a dtype torch does not know.
    """
    try:
        with safe_open(path, "pt"):  # checks all of the header
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: Place(
                path,
                name,
                8 + length + entry["data_offsets"][0],
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
            )
            for name, entry in header.items()
        }
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: not a safetensors file that can be read ({error})") from error


def give_back() -> None:
    """Return what was freed to the system; glibc keeps pages that others lie between."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def prepare_allocator() -> None:
    """Let this process return every tensor above 4 MiB to the system as soon as it is freed, which
    glibc else keeps for later, in pieces of up to 32 MiB that fit no other; and, before the first
    tensor is made, let torch take them in large pages, which the system hands out faster.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once, by the first tensor
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 22)


class ReadingInterpreter(Interpreter):
    """Runs a graph, each unread tensor read by the nodes that take it and dropped after."""

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Arguments as torch has them, unread ones read."""
        return pytree.tree_map(read_value, super().fetch_args_kwargs_from_env(n))
