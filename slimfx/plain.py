"""Results as JSON has them, their tensors beside: what is kept in a journal, and told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from slimfx.methods.quantized import Quantized
from slimfx.methods.stats import Stats
from slimfx.runtime.manifest import LayerReport
from slimfx.runtime.pack import Packed24, PackedBitmask, PackedDense, PackedLinear
from slimfx.solve import Solution

_RESULTS = (Packed24, PackedBitmask, PackedDense, PackedLinear, LayerReport)
_TYPES = {t.__name__: t for t in (*_RESULTS, Quantized, Solution, Stats)}


def plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has it, its tensors put aside under names that begin with `name`."""
    if isinstance(value, Tensor):
        first = tuple(slice(1) if stride == 0 else slice(None) for stride in value.stride())
        core = value.detach()[first]  # of a dimension that repeats itself
        tensors[name] = core.clone(memory_format=torch.contiguous_format)
        return {"tensor": name, "size": list(value.shape)}
    if is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        own = {part: plain(v, f"{name} {part}", tensors) for part, v in parts.items()}
        return {"type": type(value).__name__, **own}
    if isinstance(value, dict):
        return {"named": [[key, plain(v, f"{name} {key}", tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name} {i}", tensors) for i, item in enumerate(value)]
    return value


def built(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `plain` was given; lists become tuples."""
    if isinstance(data, list):
        return tuple(built(item, tensors) for item in data)
    if not isinstance(data, dict):
        return data
    if "tensor" in data:
        return tensors[data["tensor"]].expand(data["size"])
    if "named" in data:
        return {key: built(v, tensors) for key, v in data["named"]}
    kind = _TYPES[data["type"]]
    return kind(**{key: built(v, tensors) for key, v in data.items() if key != "type"})
