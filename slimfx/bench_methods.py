"""The paper's tables for any model: every method, 2:4 and 50% sparse, quantized and not.

Memory and FLOPs are counted as in equations 12 and 13 of the paper (arXiv 2410.09615), against the
same model in 16 bits: memory over every tensor, FLOPs over the linears.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram

from slimfx.compress import compress
from slimfx.errors import RecipeError
from slimfx.evaluate import Quality, evaluate
from slimfx.passes.inputs import tensor_inputs
from slimfx.plan import Plan, PlanRow, plan
from slimfx.recipe import Calibration, Recipe

PATTERNS = ("2:4", "50%", "-")
"""What is pruned: two of four, half of each row, nothing."""

_PRUNE_ONLY = ("magnitude", "wanda", "jsq", "sparsegpt")
_QUANTIZE_ONLY = ("absmax", "optq", "awq", "smoothquant", "omniquant", "affinequant")
_ADAPTERS = ("naive-lora", "l2qer", "qera", "slim", "slim-q", "full-lora", "joint", "joint-q")

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Row:
    """One method on one model."""

    method: str
    """A preset's name, "dense" for the model as it is."""
    pattern: str
    """"2:4", "50%" or "-"."""
    values: str
    """What a weight that stays is stored as: "int4" or "bf16"."""
    quality: float
    metric: str
    bits_per_weight: float
    """Of the compressed linears, counted to the byte, scales and adapters included."""
    memory: float
    """Share of the 16-bit model's bytes, embeddings included (equation 12)."""
    flops: float
    """Share of the dense linears' multiplications (equation 13)."""
    seconds: float
    """Time of `compress`."""
    cpu_seconds: float
    """Processor time of `compress`, all threads together: steadier on a busy machine."""


def cases() -> tuple[tuple[str, str, str], ...]:
    """(preset, pattern, values) of every row."""
    found = [
        (preset, pattern, values)
        for pattern in ("2:4", "50%")
        for values in ("int4", "bf16")
        for preset in (*_PRUNE_ONLY, *_ADAPTERS)
    ]
    found += [("slim-o", pattern, "int4") for pattern in ("2:4", "50%")]
    found += [("losparse", pattern, "int4") for pattern in ("2:4", "50%")]
    found += [("oats", pattern, "bf16") for pattern in ("2:4", "50%")]
    found += [(preset, "-", "int4") for preset in (*_QUANTIZE_ONLY, *_ADAPTERS)]
    found += [(preset, "-", "int4") for preset in ("slim-o", "lq-lora", "caldera")]
    order = {"2:4": 0, "50%": 1, "-": 2}
    return tuple(sorted(found, key=lambda case: (order[case[1]], case[2] == "bf16")))


def variant(preset: str, pattern: str, values: str) -> Recipe:
    """A preset with another pattern, or without pruning or quantization.

    Raises:
        RecipeError: no such preset or pattern, or the preset is not for that pattern.
    """
    recipe = Recipe.preset(preset)
    prune, quantize = recipe.prune, recipe.quantize
    if pattern not in PATTERNS:
        raise RecipeError(f"pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
    if pattern == "-":
        prune = None
    elif prune is None:
        raise RecipeError(f"preset {preset} prunes nothing; its pattern is -")
    else:
        prune = dataclasses.replace(prune, sparsity=0.5 if pattern == "50%" else None)
    if values == "bf16":
        quantize = None
    return dataclasses.replace(recipe, prune=prune, quantize=quantize)


def bench_methods(
    program: ExportedProgram,
    calibration: Any = None,
    text: Any = None,
    *,
    only: Sequence[str] = (),
    sampling: Calibration | None = None,
    samples: int | None = 48,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """One row for the dense model, then one for each case as soon as it is measured.

    Quality is perplexity for a program of `input_ids` alone, else the mean cosine to the dense
    program's embedding.

    Args:
        calibration, text: sources as in `slimfx.data`, to compress and to evaluate with.
        only: presets to measure; all by default.
        sampling: how many samples of which length calibrate; also the length that is evaluated.
        samples: windows or documents to evaluate on, at most.
    """
    tell = progress or (lambda share, what: None)
    sampling = sampling or Calibration()
    reads_text = list(tensor_inputs(program)) == ["input_ids"]

    def quality(candidate: ExportedProgram) -> Quality:
        dense = None if reads_text else program
        return evaluate(candidate, text, dense=dense, samples=samples, length=sampling.length)

    tell(0.0, "dense")
    found = quality(program)
    yield Row("dense", "-", "bf16", found.value, found.metric, 16.0, 1.0, 1.0, 0.0, 0.0)
    wanted = [case for case in cases() if not only or case[0] in only]
    for i, case in enumerate(wanted):
        tell(i / len(wanted), " ".join(case))
        recipe = dataclasses.replace(variant(*case), calibration=sampling)
        planned = plan(program, recipe)
        began, worked = time.perf_counter(), time.process_time()
        small = compress(program, recipe, calibration)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
        found = quality(small)
        yield Row(
            *case,
            quality=found.value,
            metric=found.metric,
            bits_per_weight=planned.bits_per_weight,
            memory=memory_share(planned),
            flops=flops_share(planned, recipe),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )


def memory_share(planned: Plan) -> float:
    """Bytes of the compressed model over those of the model in 16 bits (equation 12)."""
    weights = [row.out_features * row.in_features for row in planned.rows]
    width = planned.rows[0].bytes_before / weights[0]  # bytes a weight of the program as it is
    other = planned.other_bytes * 2 / width
    after = sum(
        2 * n if row.skipped else row.bytes_after
        for n, row in zip(weights, planned.rows, strict=True)
    )
    return (after + other) / (2 * sum(weights) + other)


def flops_share(planned: Plan, recipe: Recipe) -> float:
    """Multiplications of all linears over those of the dense ones (equation 13)."""

    def compressed(row: PlanRow) -> float:
        N, K, r = row.out_features, row.in_features, row.rank
        how = recipe.for_layer(row.name)
        if how is None:
            return N * K
        density = 1.0 if how.pattern is None else how.pattern.density
        thin = 0.5 if how.adapter is not None and how.adapter.sparse else 1.0
        return density * N * K + r * (N + thin * K)

    dense = sum(row.out_features * row.in_features for row in planned.rows)
    return sum(map(compressed, planned.rows)) / dense
