"""The plan: what a recipe will do to a program, before any compute; no weight is touched."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from slimfx.errors import PlanError
from slimfx.passes.base import input_specs, lifted_tensor
from slimfx.passes.find_linears import Site, find_linears, storage_key
from slimfx.recipe import Adapter, LayerRecipe, Quantize, Recipe
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.pack import bytes_24, bytes_int4, fits_24

_NODE_BYTES = 45
"""Deflated graph JSON of a node, about (as measured on Llama and BERT programs)."""
_ADDED_NODE_BYTES = 12
"""The same of the nodes a compressed linear consists of, which are alike."""
_RECORD_BYTES = 150
"""A tensor's zip entry and its line in the deflated weight table, about."""
_LAYER_BYTES = 35
"""A layer's deflated report in the manifest, about."""
_FIXED_BYTES = 3000
"""Golden outputs, recipe, archive marks."""


@dataclass(frozen=True)
class PlanRow:
    """One linear of the program."""

    name: str
    out_features: int
    in_features: int
    method: str
    layout: str
    """"2:4 int4", "int4", or "dense" for a layer that stays as it is."""
    rank: int
    adapter_bits: int
    bytes_before: int
    bytes_after: int
    skipped: str
    """Why the layer stays as it is, "" for a compressed one."""


@dataclass(frozen=True)
class Plan:
    """Every linear, and the totals."""

    rows: tuple[PlanRow, ...]
    other_bytes: int
    """Embeddings, norms, biases and constants, which stay."""
    overhead_bytes: int
    """Graph, manifest, tokenizer and golden inputs, about."""
    peak_memory: int
    """Bytes of tensors held at the worst moment, activations of calibration not counted."""

    @property
    def bytes_before(self) -> int:
        """All tensors of the program as it is."""
        return sum(row.bytes_before for row in self.rows) + self.other_bytes

    @property
    def bytes_after(self) -> int:
        """All tensors of the compressed program."""
        return sum(row.bytes_after for row in self.rows) + self.other_bytes

    @property
    def file_bytes(self) -> int:
        """The predicted size of the op-form file."""
        return self.bytes_after + self.overhead_bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight of the compressed linears, scales and adapters included."""
        rows = [row for row in self.rows if not row.skipped]
        weights = sum(row.out_features * row.in_features for row in rows)
        return 8 * sum(row.bytes_after for row in rows) / weights if weights else math.nan


def plan(program: ExportedProgram, recipe: Recipe | str = "slim") -> Plan:
    """One row for each linear of `program` under `recipe`, and what the file will weigh.

    Raises:
        PlanError: nothing to compress, or layers that the recipe cannot compress; all are listed,
            each with the line of the recipe that solves it.
    """
    recipe = Recipe.load(recipe)
    sites = find_linears(program)
    _refuse_problems(sites, recipe)
    rows = tuple(_row(site, recipe.for_layer(site.name)) for site in sites)
    compressed = {site.fqn for site, row in zip(sites, rows, strict=True) if not row.skipped}
    linears = {storage_key(program.state_dict[s.fqn], s.fqn) for s in sites}
    other = sum(_nbytes(tensor) for key, tensor in _storages(program).items() if key not in linears)
    dense = [4 * s.out_features * s.in_features for s in sites if s.fqn in compressed]
    total = sum(row.bytes_after for row in rows) + other
    return Plan(
        rows=rows,
        other_bytes=other,
        overhead_bytes=_overhead(program, rows),
        peak_memory=sum(map(_nbytes, _storages(program).values()))
        + total
        + 6 * max(dense, default=0),
    )


def _row(site: Site, how: LayerRecipe | None) -> PlanRow:
    N, K = site.out_features, site.in_features
    before = N * K * site.dtype.itemsize
    if how is None:
        return PlanRow(site.name, N, K, "-", "dense", 0, 0, before, before, "skipped by the recipe")
    layout = "int4" if how.prune is None or not fits_24(how.prune.n, how.prune.m) else "2:4 int4"
    scales = scale_count(N, K, how.quantize)
    after = bytes_24(N, K, scales) if layout == "2:4 int4" else bytes_int4(N, K, scales)
    rank = how.adapter.rank_for(N, K) if how.adapter else 0
    if how.adapter:
        after += _adapter_bytes(N, K, rank, how.adapter)
    bits = how.adapter.bits if how.adapter else 0
    return PlanRow(site.name, N, K, _method(how), layout, rank, bits, before, after, "")


def scale_count(N: int, K: int, how: Quantize) -> int:
    """How many scales a weight [N, K] gets."""
    return {"tensor": 1, "channel": N, "group": N * -(-K // how.group)}[how.granularity]


def _adapter_bytes(N: int, K: int, rank: int, how: Adapter) -> int:
    if how.bits != 4:
        return rank * (N + K) * how.bits // 8
    return bytes_int4(rank, K, rank * -(-K // how.group)) + bytes_int4(
        N, rank, N * -(-rank // how.group)
    )


def _method(how: LayerRecipe) -> str:
    steps = [] if how.solve.method == "one-shot" else [f"{how.solve.method}:"]
    steps.append(how.quantize.method)
    if how.prune:
        steps.append(f"{how.prune.method} {how.prune.n}:{how.prune.m}")
    if how.adapter:
        steps.append(f"{how.adapter.method} {how.adapter.bits} bit")
    return " + ".join(steps).replace(": +", ":")


def _refuse_problems(sites: list[Site], recipe: Recipe) -> None:
    problems = [
        (site.name, problem)
        for site in sites
        if (how := recipe.for_layer(site.name)) is not None
        for problem in _problems(site, how)
    ]
    if not any(recipe.for_layer(site.name) for site in sites):
        names = ", ".join(site.name for site in sites[:3]) or "the program has no linear layer"
        raise PlanError(f"nothing to compress: the recipe skips every linear ({names})")
    if problems:
        skip = list(dict.fromkeys([*recipe.skip, *(name for name, _ in problems)]))
        lines = [f"{name}: {problem}" for name, problem in problems]
        raise PlanError(
            "\n".join([*lines, f"to leave all of these as they are: skip: [{', '.join(skip)}]"])
        )


def _problems(site: Site, how: LayerRecipe) -> Iterable[str]:
    N, K = site.out_features, site.in_features
    if site.other_readers:
        yield (
            f"its weight {site.fqn} is also read by {', '.join(site.other_readers)} (tied); "
            f"add it to skip, or untie the weights before export"
        )
    if not site.dtype.is_floating_point or site.dtype.itemsize < 2:
        yield f"weight of dtype {site.dtype} is not float16, bfloat16 or float32; add it to skip"
    if how.prune is not None:
        multiple = math.lcm(how.prune.m, 4) if fits_24(how.prune.n, how.prune.m) else how.prune.m
        if K % multiple:
            yield (
                f"in_features {K} is not a multiple of {multiple}, which "
                f"{how.prune.n}:{how.prune.m} needs; add it to skip, or override it with prune: "
                f"null"
            )
    sparse = how.prune is not None and fits_24(how.prune.n, how.prune.m)
    if how.quantize.granularity == "group" and sparse and K % how.quantize.group:
        yield (
            f"in_features {K} is not a multiple of group {how.quantize.group}; "
            f"override it with quantize: {{group: {_divisor(K, how.quantize.group)}}}"
        )
    if how.adapter is not None and how.adapter.rank_for(N, K) > min(N, K):
        yield (
            f"rank {how.adapter.rank_for(N, K)} is larger than the layer [{N}, {K}] allows "
            f"({min(N, K)}); override it with adapter: {{rank: 0.1}}"
        )


def _divisor(K: int, group: int) -> int:
    return max(d for d in range(1, min(group, K) + 1) if K % d == 0)


def _storages(program: ExportedProgram) -> dict[tuple, torch.Tensor]:
    """Every tensor a file of the program holds, once for each storage."""
    found: dict[tuple, torch.Tensor] = {}
    for spec in input_specs(program).values():
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            tensor = lifted_tensor(program, spec)
            if isinstance(tensor, torch.Tensor):
                found.setdefault(storage_key(tensor, str(spec.target)), tensor)
    return found


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _overhead(program: ExportedProgram, rows: tuple[PlanRow, ...]) -> int:
    tokenizer = manifest_of(program).tokenizer
    compressed = [row for row in rows if not row.skipped]
    tensors = sum(2 + (4 if row.adapter_bits == 4 else 2) * bool(row.rank) for row in compressed)
    calls = sum(5 * bool(row.rank) for row in compressed)
    inputs = pytree.tree_leaves(program.example_inputs)
    return (
        _FIXED_BYTES
        + sum(_nbytes(value) for value in inputs if isinstance(value, torch.Tensor))
        + (len(zlib.compress(tokenizer.encode())) if tokenizer else 0)
        + len(program.graph.nodes) * _NODE_BYTES
        + (tensors + calls) * _ADDED_NODE_BYTES
        + (len(input_specs(program)) + tensors) * _RECORD_BYTES
        + len(compressed) * _LAYER_BYTES
    )
