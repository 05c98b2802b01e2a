"""Narrow how large the inputs of a program may be, for runtimes that reserve memory ahead."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from slimfx.passes.inputs import input_names, module_of
from slimfx.runtime.manifest import attach, manifest_of
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError

_NO_LIMIT = 1 << 62


def limit_sizes(
    program: ExportedProgram, *, batch: int | None = None, length: int | None = None
) -> ExportedProgram:
    """The same program for smaller inputs only, traced anew; itself where nothing changes.

    Args:
        batch: largest size of the first dimension of inputs where it may vary; None for the least
            the program takes.
        length: the same of the second dimension, and of all that are as long; None for the most.

    Raises:
        ArtifactError: no example inputs, a limit below what the program takes, or a length that
            has none.
    """
    wanted: dict[Any, tuple[int, int]] = {}
    for symbol, where, (least, most) in _symbols(program):
        limit = length if where == "length" else least if batch is None else batch
        if limit is None and most >= _NO_LIMIT:
            raise ArtifactError(
                "the inputs of the program may be of any length, and memory is reserved for the "
                "largest; give length"
            )
        if limit is not None and limit < least:
            raise ArtifactError(f"{where} {limit} is below {least}, the least the program takes")
        wanted.setdefault(symbol, (least, most if limit is None else min(most, limit)))
    if all(wanted[symbol] == limits for symbol, _, limits in _symbols(program)):
        return program
    return _traced(program, wanted)


def _symbols(program: ExportedProgram) -> Iterator[tuple[Any, str, tuple[int, int]]]:
    """Each size of an input that varies: its symbol, "batch" or "length", and its range; lengths
    first, since an input may have one as its first dimension.
    """
    values = _values(program)
    for where, place in (("length", 1), ("batch", 0)):
        for value in values:
            size: Any = value.shape[place] if value.dim() > place else None
            if isinstance(size, torch.SymInt):
                symbol = size.node.expr
                limits = program.range_constraints[symbol]
                most = _NO_LIMIT if limits.upper > _NO_LIMIT else int(limits.upper)
                yield symbol, where, (max(1, int(limits.lower)), most)


def _values(program: ExportedProgram) -> list[Tensor]:
    names = set(input_names(program))
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in names]
    return [value for value in values if isinstance(value, Tensor)]


def _traced(program: ExportedProgram, wanted: dict[Any, tuple[int, int]]) -> ExportedProgram:
    if program.example_inputs is None:
        raise ArtifactError("the program has no example inputs; export it with some")
    leaves, spec = pytree.tree_flatten(program.example_inputs)
    values = iter(_values(program))
    shapes = [_shape(next(values)) if isinstance(leaf, Tensor) else None for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(
        [_narrowed(leaf, symbols, wanted) for leaf, symbols in zip(leaves, shapes)], spec
    )
    dims = {
        symbol: Dim(str(symbol), min=least, max=most)
        for symbol, (least, most) in wanted.items()
        if least < most
    }
    marked = [
        symbols and {d: dims[symbol] for d, symbol in enumerate(symbols) if symbol in dims}
        for symbols in shapes
    ]
    module = module_of(program)
    of_args, of_kwargs = pytree.tree_unflatten(marked, spec)
    bound = inspect.signature(module.forward).bind(*of_args, **of_kwargs)
    with torch.no_grad():
        traced = torch.export.export(
            module, args, kwargs=kwargs, dynamic_shapes=dict(bound.arguments), strict=False
        )
    return attach(traced, manifest_of(program))


def _shape(value: Tensor) -> list[Any]:
    """The symbol of each dimension that varies, None for another."""
    return [size.node.expr if isinstance(size, torch.SymInt) else None for size in value.shape]


def _narrowed(leaf: Any, symbols: list[Any] | None, wanted: dict[Any, tuple[int, int]]) -> Any:
    """An example input within the limits."""
    for d, symbol in enumerate(symbols or ()):
        if symbol in wanted:
            leaf = leaf.narrow(d, 0, min(leaf.shape[d], wanted[symbol][1]))
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf
