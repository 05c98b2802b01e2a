"""The plan: what a recipe will do to a program, before any compute; no weight is touched."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from slimfx import tables
from slimfx.errors import PlanError
from slimfx.memory import Layer, peak_memory
from slimfx.methods.masks import NofM
from slimfx.passes.base import input_specs, lifted_tensor
from slimfx.passes.find_linears import Site, find_linears, storage_key
from slimfx.passes.replace_tables import Table, find_tables
from slimfx.recipe import Recipe
from slimfx.runtime.manifest import manifest_of
from slimfx.runtime.pack import FLOAT_BITS, Layout, fits_24
from slimfx.steps import Adapter, LayerRecipe, Quantize

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
    """Such as "2:4 int4" (`Layout.name`), or "dense" for a layer that stays as it is."""
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
    """Embeddings, norms, biases and constants."""
    saved_bytes: int
    """Of those, what embeddings in fewer bits save."""
    overhead_bytes: int
    """Graph, manifest, tokenizer and golden inputs, about."""
    peak_memory: int
    """Bytes that compression takes at the worst moment, above an interpreter that has imported
    slimfx; each process takes as much."""

    @property
    def bytes_before(self) -> int:
        """All tensors of the program as it is."""
        return sum(row.bytes_before for row in self.rows) + self.other_bytes

    @property
    def bytes_after(self) -> int:
        """All tensors of the compressed program."""
        return sum(row.bytes_after for row in self.rows) + self.other_bytes - self.saved_bytes

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

    def _repr_html_(self) -> str:
        """A row for each linear, in notebooks."""
        caption = f"{self.bytes_before:,} bytes become {self.bytes_after:,}"
        return tables.table(caption, _COLUMNS, self.rows).html()

    def to_pandas(self) -> Any:
        """A data frame with a row for each linear.

        Raises:
            SlimError: pandas is not installed.
        """
        return tables.to_pandas(PlanRow, self.rows)


_COLUMNS = {
    "layer": ("name", ""),
    "out": ("out_features", ",d"),
    "in": ("in_features", ",d"),
    "layout": ("layout", ""),
    "rank": ("rank", "d"),
    "method": ("method", ""),
    "before": ("bytes_before", ",d"),
    "after": ("bytes_after", ",d"),
    "why it stays": ("skipped", ""),
}


def plan(program: ExportedProgram, recipe: Recipe | str = "joint") -> Plan:
    """One row for each linear of `program` under `recipe`, and what the file will weigh.

    Raises:
        PlanError: nothing to compress, or layers that the recipe cannot compress; all are listed,
            each with the line of the recipe that solves it.
    """
    recipe = Recipe.load(recipe)
    if recipe.budget is not None:
        raise PlanError("a budget is searched with data: compress does it, or slimfx.budget.fit")
    sites = find_linears(program)
    _refuse_problems(sites, recipe)
    tables = {table.fqn: table for table in tables_to_replace(program, recipe)}
    rows = tuple(
        _head_row(site, tables[site.fqn])
        if site.fqn in tables
        else row_of(site, recipe.for_layer(site.name))
        for site in sites
    )
    linears = {storage_key(program.state_dict[s.fqn], s.fqn) for s in sites}
    other = sum(_nbytes(tensor) for key, tensor in _storages(program).items() if key not in linears)
    saved = sum(
        _nbytes(program.state_dict[fqn]) - table_bytes(table, recipe.embeddings or 0)
        for fqn, table in tables.items()
        if not table.heads
    )
    layers = [
        Layer(site, how, row.bytes_after)
        for site, row in zip(sites, rows, strict=True)
        if not row.skipped and (how := recipe.for_layer(site.name)) is not None
    ]
    held = peak_memory(program, layers, recipe.calibration)
    if not any(tensor.is_meta for tensor in program.state_dict.values()):
        held += sum(map(_nbytes, _storages(program).values())) + other - saved
        held += sum(row.bytes_after for row in rows)
    return Plan(
        rows=rows,
        other_bytes=other,
        saved_bytes=saved,
        overhead_bytes=_overhead(program, rows),
        peak_memory=held,
    )


def tables_to_replace(program: ExportedProgram, recipe: Recipe) -> list[Table]:
    """The embeddings that the recipe stores in fewer bits.

    Raises:
        PlanError: something reads one that can read nothing but floats.
    """
    bits, problems, found = recipe.embeddings, [], []
    for table in find_tables(program) if bits is not None else []:
        others = (*table.others, *(table.heads if bits == FLOAT_BITS else ()))
        if others:
            problems.append(
                f"{table.fqn}: embeddings: {bits} does not fit a table that {', '.join(others)} "
                f"reads, too; set embeddings: {'8' if not table.others else 'null'}"
            )
        if table.dtype.itemsize * 8 > bits:  # type: ignore[operator]
            found.append(table)
    if problems:
        raise PlanError("\n".join(problems))
    return found


def table_bytes(table: Table, bits: int) -> int:
    """What a table takes: bfloat16, or codes with a bfloat16 scale for each row."""
    rows, width = table.shape
    return rows * (2 * width if bits == FLOAT_BITS else width + 2)


def _head_row(site: Site, table: Table) -> PlanRow:
    """A head that multiplies with the codes of the embeddings."""
    N, K = site.out_features, site.in_features
    before, after = N * K * site.dtype.itemsize, table_bytes(table, 8)
    return PlanRow(
        *(site.name, N, K, "absmax 8 bit", "int8", 0, 0, before, after),
        "tied to the embeddings, in eight bits",
    )


def row_of(site: Site, how: LayerRecipe | None) -> PlanRow:
    """A linear under its recipe, its bytes exact; None leaves it as it is."""
    N, K = site.out_features, site.in_features
    before = N * K * site.dtype.itemsize
    if how is None or site.routes:
        why = "topk chooses among its answers" if site.routes else "skipped by the recipe"
        return PlanRow(site.name, N, K, "-", "dense", 0, 0, before, before, why)
    layout = layout_of(how)
    kept = N * K if how.pattern is None else how.pattern.kept(N, K)
    scales = 0 if how.quantize is None else scale_count(N, K, how.quantize)
    after = layout.bytes(N, K, kept=kept, scales=scales)
    if how.scales_inputs:
        after += 2 * K
    rank = how.adapter.rank_for(N, K) if how.adapter else 0
    if how.adapter:
        after += _adapter_bytes(N, K, rank, how.adapter)
    bits = how.adapter.bits if how.adapter else 0
    return PlanRow(site.name, N, K, _method(how), layout.name, rank, bits, before, after, "")


def layout_of(how: LayerRecipe) -> Layout:
    """Where the weights of a layer are stored: 2:4 where the pattern allows it, a bitmask where
    that is smaller than all codes, else densely.
    """
    pattern = how.pattern
    bits = FLOAT_BITS if how.quantize is None else how.quantize.bits
    if pattern is None:
        return Layout("dense", bits)
    if isinstance(pattern, NofM) and fits_24(pattern.n, pattern.m):
        return Layout("2:4", bits)
    smaller = bits == FLOAT_BITS or 1 + pattern.density * bits < bits
    return Layout("bitmask" if smaller else "dense", bits)


def scale_count(N: int, K: int, how: Quantize) -> int:
    """How many scales a weight [N, K] gets."""
    return {"tensor": 1, "channel": N, "group": N * -(-K // how.group)}[how.granularity]


def adapter_layout(how: Adapter) -> Layout:
    """How L is stored; R is like it, never sparse."""
    return Layout("2:4" if how.sparse else "dense", how.bits)


def _adapter_bytes(N: int, K: int, rank: int, how: Adapter) -> int:
    coded = how.bits == 4
    R = N * rank * how.bits // 8
    if coded:
        R = Layout("dense", 4).bytes(N, rank, kept=0, scales=N * -(-rank // how.group))
    if not (coded or how.sparse):
        return R + rank * K * how.bits // 8
    scales = rank * -(-K // how.group) if coded else 0
    return R + adapter_layout(how).bytes(rank, K, kept=0, scales=scales)


def _method(how: LayerRecipe) -> str:
    steps = []
    if how.transform:
        steps.append(how.transform.method)
    if how.quantize:
        steps.append(f"{how.quantize.method} {how.quantize.bits} bit")
    if how.prune:
        n_m = f"{how.prune.n}:{how.prune.m}"
        share = n_m if how.prune.sparsity is None else f"{how.prune.sparsity:.0%}"
        steps.append(f"{how.prune.method} {share}")
    if how.adapter:
        steps.append(f"{how.adapter.method} {how.adapter.bits} bit")
    if how.inputs:
        steps.append(f"{how.inputs.format} inputs")
    prefix = "" if how.solve.method == "one-shot" else f"{how.solve.method}: "
    return prefix + " + ".join(steps)


def _refuse_problems(sites: list[Site], recipe: Recipe) -> None:
    problems = [
        (site.name, problem)
        for site in sites
        if (how := recipe.for_layer(site.name)) is not None and not site.routes
        for problem in problems_of(site, how)
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


def problems_of(site: Site, how: LayerRecipe) -> Iterable[str]:
    """Why the recipe cannot compress a linear, each with the line of a recipe that solves it."""
    N, K = site.out_features, site.in_features
    if site.other_readers:
        yield (
            f"its weight {site.fqn} is also read by {', '.join(site.other_readers)} (tied); "
            f"add it to skip, or untie the weights before export"
        )
    if not site.dtype.is_floating_point or site.dtype.itemsize < 2:
        yield f"weight of dtype {site.dtype} is not float16, bfloat16 or float32; add it to skip"
    pattern = how.pattern
    if isinstance(pattern, NofM):
        multiple = math.lcm(pattern.m, 4 if layout_of(how).where == "2:4" else 1)
        if K % multiple:
            yield (
                f"in_features {K} is not a multiple of {multiple}, which "
                f"{pattern.n}:{pattern.m} needs; add it to skip, or override it with prune: null"
            )
    elif pattern is not None and pattern.kept(N, K) == 0:
        yield (
            f"sparsity {pattern.sparsity} leaves none of its {N} x {K} weights; add it to skip, "
            f"or override it with prune: null"
        )
    if how.adapter is not None and how.adapter.sparse and K % 4:
        yield (
            f"in_features {K} is not a multiple of 4, which a sparse adapter needs; override it "
            f"with adapter: {{sparse: false}}"
        )
    if how.adapter is not None and how.adapter.rank_for(N, K) > min(N, K):
        yield (
            f"rank {how.adapter.rank_for(N, K)} is larger than the layer [{N}, {K}] allows "
            f"({min(N, K)}); override it with adapter: {{rank: 0.1}}"
        )


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
