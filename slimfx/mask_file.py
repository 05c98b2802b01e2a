"""Masks that were made elsewhere, such as MaskLLM's (Fang et al. 2024), read from a file.

A file holds one array for each layer. Its key is the layer's name or that of its weight, and may
end in ".mask": "h.0.fc", "h.0.fc.weight" and "h.0.fc.weight.mask" are the same layer. One (true)
stays, zero (false) goes. The array of a layer [N, K] has one of three forms:

    [N, K]             booleans, or numbers that are all 0 or 1
    [N, ceil(K / 8)]   uint8, np.packbits(mask, axis=1)
    [ceil(N K / 8)]    uint8, np.packbits(mask), as MaskLLM publishes its masks
"""

from __future__ import annotations

import difflib
import math
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slimfx.errors import RecipeError
from slimfx.methods.masks import NofM, Pattern

_TYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_BROKEN = (OSError, ValueError, EOFError, MemoryError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Masks:
    """The arrays of a mask file as they were stored, by the name of their layer."""

    path: str
    arrays: dict[str, Tensor]
    keys: dict[str, str]
    """What each layer is called in the file."""


def read_masks(path: str | Path) -> Masks:
    """Read a .safetensors or .npz file; nothing in it is ever unpickled.

    Raises:
        RecipeError: the file is missing, damaged, of another kind, or names a layer twice.
    """
    arrays: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for key, array in _load(Path(path)).items():
        name = key.removesuffix(".mask").removesuffix(".weight")
        if name in keys:
            raise RecipeError(
                f"{path}: {keys[name]} and {key} are both masks of layer {name}; leave one out"
            )
        arrays[name], keys[name] = array, key
    return Masks(str(path), arrays, keys)


def check_names(masks: Masks, layers: Iterable[str]) -> None:
    """Refuse a file that holds the mask of a layer that is not one of `layers`.

    Raises:
        RecipeError: naming the first such key.
    """
    layers = list(layers)
    for name in masks.keys:
        if name not in layers:
            raise RecipeError(
                f"{masks.path}: {masks.keys[name]} is the mask of no layer{_close(name, layers)}; "
                f"rename it or leave it out"
            )


def mask_for(name: str, masks: Masks, shape: tuple[int, int], pattern: Pattern) -> Tensor:
    """The mask [N, K] of layer `name`, true where a weight stays.

    Raises:
        RecipeError: there is none, or it is not of the layer's shape and pattern.
    """
    if name not in masks.arrays:
        raise RecipeError(
            f"{masks.path}: no mask for layer {name}{_close(name, masks.arrays)}; add it to the "
            f"file under this name, or add the layer to skip"
        )
    where = f"{masks.path}: {masks.keys[name]}"
    mask = _unpacked(where, masks.arrays[name], shape)
    check_mask(where, mask, shape, pattern)
    return mask


def check_mask(name: str, mask: Tensor, shape: tuple[int, int], pattern: Pattern) -> None:
    """Refuse a boolean mask that is not exactly what the pattern says.

    Args:
        name: what the message calls the mask.

    Raises:
        RecipeError: another shape, or another number of weights that stay.
    """
    N, K = shape
    if tuple(mask.shape) != shape:
        raise RecipeError(f"{name}: shape {list(mask.shape)} is not the layer's {[N, K]}")
    if isinstance(pattern, NofM):
        if K % pattern.m:
            raise RecipeError(f"{name}: {K} inputs are no multiple of {pattern.m}; skip the layer")
        _check_counts(name, mask.reshape(N, -1, pattern.m), pattern.n, "n:m group")
    elif pattern.scope == "row":
        _check_counts(name, mask, pattern.kept(1, K), "row")
    else:
        _check_counts(name, mask.flatten(), pattern.kept(N, K), "layer")


def _check_counts(name: str, mask: Tensor, expected: int, where: str) -> None:
    counts = mask.sum(-1)
    wrong = counts != expected
    if wrong.any():
        raise RecipeError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} ({where}) do not keep {expected} of "
            f"{mask.shape[-1]} weights, the first keeps {int(counts[wrong][0])}; set n, m, "
            f"sparsity and scope of prune to what the mask is"
        )


def _unpacked(where: str, array: Tensor, shape: tuple[int, int]) -> Tensor:
    N, K = shape
    packed = {(N, math.ceil(K / 8)): (N, K), (math.ceil(N * K / 8),): (1, N * K)}
    found = tuple(array.shape)
    if found != shape and found in packed and array.dtype == torch.uint8:
        rows, width = packed[found]
        bits = np.unpackbits(array.reshape(rows, -1).numpy(), axis=1)
        if bits[:, width:].any():
            raise RecipeError(f"{where}: bits are set behind the {width} of {[N, K]}; pack it anew")
        return torch.from_numpy(bits[:, :width].astype(bool)).reshape(N, K)
    if found != shape:
        raise RecipeError(
            f"{where}: shape {list(found)} of type {array.dtype} is neither the layer's {[N, K]} "
            f"nor packed uint8 {' or '.join(str(list(form)) for form in packed)}"
        )
    if not ((array == 0) | (array == 1)).all():
        raise RecipeError(f"{where}: a mask holds 0 and 1 alone, this one other values")
    return array.bool()


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".npz"):
        raise RecipeError(f"{path}: masks are read from .safetensors or .npz; convert the file")
    try:
        if path.suffix == ".safetensors":
            arrays = safetensors.torch.load_file(path)
        else:
            arrays = {key: _tensor(array) for key, array in _arrays(path).items()}
    except (*_BROKEN, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
        raise RecipeError(f"{path}: no masks can be read there ({error})") from error
    for key, array in arrays.items():
        if str(array.dtype).removeprefix("torch.") not in (*_TYPES, "bfloat16"):
            raise RecipeError(f"{path}: {key} has type {array.dtype}; store booleans")
    return arrays


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as members:
        for member in members.infolist():
            if member.file_size > 200 * member.compress_size + (1 << 20):
                raise ValueError(
                    f"{member.filename} is packed more than 200-fold; store it as it is"
                )
    archive = np.load(path, allow_pickle=False)
    if isinstance(archive, np.ndarray):
        raise ValueError("one array without a name")
    with archive:
        return dict(archive)


def _tensor(array: np.ndarray) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise ValueError("a member that is no array")
    if array.dtype.name not in _TYPES:
        raise ValueError(f"an array of type {array.dtype}")
    return torch.from_numpy(array)


def _close(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
