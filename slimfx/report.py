"""What there is to say about an artifact, gathered from its file: what it stores, what that cost,
what runs it.
"""

from __future__ import annotations

import math
import statistics
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from slimfx import tables
from slimfx.check import target_of
from slimfx.errors import ArtifactError, SlimError
from slimfx.evaluate import Quality, evaluate
from slimfx.passes.compressed_linears import CompressedLinear
from slimfx.passes.find_linears import PREFIX, find_linears, storage_key
from slimfx.passes.inputs import tensor_inputs
from slimfx.report_kernels import Kernel, kernels_of, linears_of
from slimfx.report_speed import Speeds, speeds_of
from slimfx.runtime.golden import CheckResult
from slimfx.runtime.manifest import LayerReport, Manifest, manifest_of
from slimfx.runtime.pack import row_count
from slimfx.runtime.targets import pt2
from slimfx.tasks import TaskScore, run_tasks

_PARTS = {
    **{"values": "codes", "codes": "codes", "indices": "positions", "mask": "positions"},
    **{"scale": "scales", "input_scale": "scales of inputs"},
}
"""Name of a stored tensor after `PREFIX` -> what it is; the others are L and R of adapters."""
_LEFT = "linears left as they are"
_REST = "embeddings, norms, biases"
_RECORDS = {"models/": "graph", "slimfx/tokenizer": "tokenizer", "slimfx/golden": "golden outputs"}
_ARCHIVE = "manifest, names, archive"
_LARGEST = 1 << 53
"""Of any count that a manifest may say."""


@dataclass(frozen=True)
class Part:
    """What a share of the file's bytes is for."""

    name: str
    bytes: int
    share: float
    bits: float | None
    """For each weight of the compressed linears; None for what is none of theirs."""


@dataclass(frozen=True)
class Weight:
    """A compressed linear, or a tensor that stays as it is."""

    name: str
    stored: str
    """The layout, or the dtype."""
    shape: str
    bytes: int
    why: str
    """What was out of the ordinary, or why it stays; "" where there is nothing to say."""


@dataclass(frozen=True)
class Report:
    """Everything `slimfx report` shows of one artifact."""

    name: str
    bytes: int
    manifest: Manifest
    parts: tuple[Part, ...]
    weights: tuple[Weight, ...]
    kernels: tuple[Kernel, ...]
    golden: CheckResult | str
    """How it answers its recorded inputs here, or why that cannot be asked."""
    quality: Quality | None = None
    speeds: Speeds | None = None
    """Of the linears on this CPU, where that was asked for."""
    scores: tuple[TaskScore, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight of the compressed linears; nan where there is none."""
        bits = [part.bits for part in self.parts if part.bits is not None]
        return sum(bits) if bits else math.nan

    @property
    def snr(self) -> float:
        """The median of the layers' signal to noise, in dB; nan where there is none."""
        known = [row.snr for row in self.manifest.layers if not math.isnan(row.snr)]
        return statistics.median(known) if known else math.nan

    @property
    def passed(self) -> bool:
        """Nothing contradicts the recorded outputs."""
        return isinstance(self.golden, str) or self.golden.passed

    def _repr_html_(self) -> str:
        """The layers as a table, in notebooks."""
        caption = f"{self.name}: {self.bytes:,} bytes, {self.bits_per_weight:.2f} bits a weight"
        return tables.table(caption, LAYER_COLUMNS, self.manifest.layers).html()

    def to_pandas(self) -> Any:
        """The layers as a data frame.

        Raises:
            SlimError: pandas is not installed.
        """
        return tables.to_pandas(LayerReport, self.manifest.layers)


LAYER_COLUMNS = {
    "layer": ("name", ""),
    "out": ("out_features", ",d"),
    "in": ("in_features", ",d"),
    "layout": ("layout", ""),
    "rank": ("rank", "d"),
    "bytes": ("bytes", ",d"),
    "SNR, dB": ("snr", ".1f"),
    "without adapters": ("snr_without_adapter", ".1f"),
    "taken up by 1/8, 1/4, 1/2, all of the rank": ("spectrum", ".0%"),
    "clipped": ("clipped", ".3%"),
    "tokens": ("tokens", ",d"),
    "notes": ("notes", ""),
}


@dataclass(frozen=True)
class Measures:
    """What to measure a program's quality by."""

    text: Any = None
    """A source as in `slimfx.data`: perplexity on it, of encoders the cosine to the dense model's
    embeddings; None: neither."""
    samples: int | None = None
    """Windows or documents of it at most."""
    tasks: Sequence[str] = ()
    """Of lm-eval, as `slimfx.tasks.run_tasks` takes them."""
    limit: int | None = None
    """Documents of each task at most."""


_NONE = Measures()


def report(
    path: str | Path,
    measures: Measures = _NONE,
    *,
    dense: ExportedProgram | None = None,
    timed: bool = False,
) -> Report:
    """Look at a `.pt2` that slimfx wrote, and ask it its recorded inputs again.

    Args:
        dense: the program before compression, which encoders are compared with.
        timed: also measure how fast this CPU runs its linears, which takes a C++ compiler.

    Raises:
        ArtifactError: missing, damaged or unsafe, or machine code, which has no layers.
        CalibrationError: too little text, or no tokenizer.
        SlimError: a text for an encoder and no `dense`; no compiler; as `run_tasks`.
    """
    path = Path(path)
    if path.is_dir() or target_of(path) != "pt2":
        raise ArtifactError(
            f"{path}: no exported program of torch; report on the .pt2 that it was made from"
        )
    golden, program = _golden(path), pt2.load(path)  # one after the other: each is a whole model
    manifest, linears = _checked(manifest_of(program), path.name), linears_of(program)
    sizes = {name: _size(linear) for name, linear in linears.items()}
    sizes |= {row.name: (row.out_features, row.in_features) for row in manifest.layers}
    held, shared = _held(program)
    left = {site.fqn: site.name for site in find_linears(program)}
    return Report(
        *(path.name, path.stat().st_size, manifest),
        parts=_parts(path, held, left, sum(N * K for N, K in sizes.values())),
        weights=tuple(_weights(held, shared, left, manifest, sizes)),
        kernels=kernels_of(linears),
        golden=golden,
        quality=_quality(program, measures, dense),
        scores=_scores(program, measures),
        speeds=speeds_of(linears) if timed else None,
    )


def dense_report(program: ExportedProgram, name: str, measures: Measures = _NONE) -> Report:
    """What there is to say of a program before compression: the bytes of its tensors, its quality.

    Raises:
        CalibrationError, SlimError: as `report`.
    """
    size = sum(tensor.nbytes for tensor in _held(program)[0].values())
    quality = None if _is_encoder(program) else _quality(program, measures)
    return Report(
        *(name, size, Manifest(), (), (), (), ""), quality, scores=_scores(program, measures)
    )


def _is_encoder(program: ExportedProgram) -> bool:
    return "attention_mask" in tensor_inputs(program)


def _scores(program: ExportedProgram, measures: Measures) -> tuple[TaskScore, ...]:
    return run_tasks(program, measures.tasks, limit=measures.limit) if measures.tasks else ()


def _quality(
    program: ExportedProgram, measures: Measures, dense: ExportedProgram | None = None
) -> Quality | None:
    if measures.text is None:
        return None
    if not _is_encoder(program):
        return evaluate(program, measures.text, samples=measures.samples)
    if dense is None:
        raise SlimError(
            "a program that takes an attention_mask is an encoder, which has no perplexity; give "
            "the model before compression as well (dense=, --dense), which it is compared with"
        )
    return evaluate(program, measures.text, dense=dense, samples=measures.samples)


def _checked(manifest: Manifest, name: str) -> Manifest:
    """The same, if its counts are ones."""
    for row in manifest.layers:
        for item in fields(row):
            value, least = getattr(row, item.name), 0 if item.type == "int" else -_LARGEST
            if isinstance(value, int) and not least <= value <= _LARGEST:
                raise ArtifactError(
                    f"{name}: the manifest is damaged: {item.name} of a layer is {str(value)[:20]}"
                )
    return manifest


def _golden(path: Path) -> CheckResult | str:
    try:
        return pt2.check(path)
    except ArtifactError as error:
        return str(error).removeprefix(f"{path}: ")


def _size(linear: CompressedLinear) -> tuple[int, int]:
    (weight, K), *_ = linear.matrices()
    return row_count(weight), K  # type: ignore[arg-type]


def _held(program: ExportedProgram) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of the file under its first name, and the other names of those that share it."""
    first: dict[tuple, str] = {}
    held, shared = {}, {}
    for name, tensor in {**program.state_dict, **program.constants}.items():
        if isinstance(tensor, Tensor):
            owner = first.setdefault(storage_key(tensor, name), name)
            if owner == name:
                held[name] = tensor
            else:
                shared[name] = owner
    return held, shared


def _layer_and_part(name: str) -> tuple[str, str]:
    """Of a tensor: the compressed layer that it belongs to, "" for none, and its part of that."""
    layer, mark, part = name.rpartition(f".{PREFIX}")
    return (layer, _PARTS.get(part, "adapters")) if mark and "." not in part else ("", "")


def _parts(
    path: Path, held: Mapping[str, Tensor], left: Mapping[str, str], weights: int
) -> tuple[Part, ...]:
    """What the bytes of a file are for; together all of them."""
    size, sums = path.stat().st_size, Counter[str]()
    for name, tensor in held.items():
        sums[_layer_and_part(name)[1] or (_LEFT if name in left else _REST)] += tensor.nbytes
    compressed = {part: count for part, count in sums.items() if part not in (_LEFT, _REST)}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            record = entry.filename.partition("/")[2]
            for start, part in _RECORDS.items():
                sums[part] += entry.compress_size * record.startswith(start)
    sums[_ARCHIVE] = size - sums.total()
    bits = {part: 8 * count / weights for part, count in compressed.items() if weights}
    return tuple(
        Part(part, count, count / size, bits.get(part))
        for part, count in sums.most_common()
        if count
    )


def _weights(
    held: Mapping[str, Tensor],
    shared: Mapping[str, str],
    left: Mapping[str, str],
    manifest: Manifest,
    sizes: Mapping[str, tuple[int, int]],
) -> Iterable[Weight]:
    """A row for each compressed layer, then for each other tensor; together all tensors' bytes."""
    layers = {row.name: row for row in manifest.layers}
    sums = Counter[str]()
    for name, tensor in held.items():
        sums[_layer_and_part(name)[0]] += tensor.nbytes
    for layer, count in sums.items():
        if layer:
            row = layers.get(layer)
            N, K = sizes.get(layer, ("?", "?"))
            why = "; ".join(row.notes) if row else "no report: slimfx did not compress it itself"
            yield Weight(layer, row.layout if row else "compressed", f"{N} x {K}", count, why)
    for name, tensor in held.items():
        if not _layer_and_part(name)[0]:
            why = "no weight of a linear"
            if name in left:
                why = str(manifest.skipped.get(left[name], "a linear that no recipe names"))
            yield _plain(name, tensor, tensor.nbytes, why)
    for name, owner in shared.items():
        yield _plain(name, held[owner], 0, f"the same memory as {owner}")


def _plain(name: str, tensor: Tensor, count: int, why: str) -> Weight:
    shape = " x ".join(map(str, tensor.shape)) or "one number"
    return Weight(name, str(tensor.dtype).removeprefix("torch."), shape, count, why)
