"""A program's inputs: their names, their ranges, and calling it with a batch of named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from slimfx.passes.base import written_buffers
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from slimfx.errors import SlimError


@dataclass(frozen=True)
class InputInfo:
    """One input: its dtype and, for each dimension, the least and the largest size (None: no
    limit).
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, int | None], ...]


def input_names(program: ExportedProgram) -> list[str]:
    """The names of all inputs, constants among them, in call order."""
    specs = program.graph_signature.input_specs
    return [spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT]  # type: ignore[union-attr]


def tensor_inputs(program: ExportedProgram) -> dict[str, InputInfo]:
    """The tensor inputs by name, in call order."""
    users = set(input_names(program))
    found = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, torch.Tensor):
            sizes = tuple(_range(program, size) for size in value.shape)
            found[node.name] = InputInfo(node.name, value.dtype, sizes)
    return found


def described(program: ExportedProgram) -> list[dict[str, Any]]:
    """`tensor_inputs` as JSON holds it: name, dtype, and [smallest, largest] of each dimension."""
    return [
        {"name": each.name, "dtype": str(each.dtype), "sizes": [list(size) for size in each.sizes]}
        for each in tensor_inputs(program).values()
    ]


def _range(program: ExportedProgram, size: int | torch.SymInt) -> tuple[int, int | None]:
    if isinstance(size, int):
        return size, size
    limits = program.range_constraints.get(size.node.expr)
    if limits is None:
        return 1, None
    lower = int(limits.lower)
    return lower, None if limits.upper > 1 << 62 else int(limits.upper)


def flat_inputs(program: ExportedProgram, batch: Any) -> list[Any]:
    """The values of a batch in placeholder order.

    A batch is a tensor, a sequence in call order, or a mapping from input name to tensor.

    Raises:
        SlimError: names or number of inputs differ from the program's.
    """
    names = input_names(program)
    if isinstance(batch, Mapping):
        if set(batch) != set(names):
            raise SlimError(
                f"a batch has inputs {sorted(batch)}, the program takes {sorted(names)}"
            )
        return [batch[name] for name in names]
    values = list(batch) if isinstance(batch, Sequence) else [batch]
    if len(values) != len(names):
        raise SlimError(
            f"a batch has {len(values)} inputs, the program takes {len(names)}: {names}"
        )
    return values


def call_arguments(program: ExportedProgram, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same batch as (args, kwargs) for `program.module()`."""
    args, kwargs = pytree.tree_unflatten(flat_inputs(program, batch), program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def module_of(program: ExportedProgram) -> torch.nn.Module:
    """`program.module()` with its own copies of what it writes to, so that the program stays."""
    module = program.module()
    written = written_buffers(program)
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and f"{prefix}.{name}".lstrip(".") in written:
                part._buffers[name] = buffer.clone()
    return module


def rows_at_once(program: ExportedProgram, wanted: int) -> int:
    """`wanted` rows of text, or the nearest number the program takes."""
    fewest, most = tensor_inputs(program)["input_ids"].sizes[0]
    return max(fewest, wanted if most is None else min(wanted, most))


def text_batch(program: ExportedProgram, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of tokens as a program takes them: seen from end to end, from the first position on.

    Rows that it takes more of are the last one again.
    """
    missing = tensor_inputs(program)["input_ids"].sizes[0][0] - len(ids)
    if missing > 0:
        ids = torch.cat([ids, ids[-1:].expand(missing, -1)])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "cache_position": torch.arange(ids.shape[-1], device=ids.device),
    }
    return {name: value for name, value in batch.items() if name in tensor_inputs(program)}
