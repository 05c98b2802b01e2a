"""A compressed program in the form of a place that deploys it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from torch.export import ExportedProgram

from slimfx.errors import ArtifactError
from slimfx.runtime.targets import aoti

TARGETS = ("aoti",)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    bytes: int
    kernels: int
    """Calls of our kernels; linears that read the same input share one."""
    linears: int
    """Compressed linears in them."""
    left: tuple[str, ...]
    """Compressed linears without a kernel, which were written out in ATen, and why."""


def export(
    program: ExportedProgram,
    target: str,
    path: str | Path,
    *,
    march: str = "native",
    accuracy: str = "exact",
) -> Exported:
    """Write a program for a target.

    Args:
        target: "aoti", a package of machine code with our kernels in it, for torch or libtorch.
        march: "native" for this processor, "x86-64-v3" (AVX2) or "x86-64-v4" (AVX-512) for others.
        accuracy: "exact", or "int8-activations" to round the inputs of compressed linears, row by
            row, to eight bits.

    Raises:
        ArtifactError: unknown target, march or accuracy, missing folder, or the compiler failed.
    """
    if target not in TARGETS:
        raise ArtifactError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    size, report = aoti.save(program, path, march=march, accuracy=accuracy)
    if report.left:
        warnings.warn(
            f"{path}: {len(report.left)} compressed linears have no kernel and were written out in "
            f"ATen, which is slow; the first: {report.left[0]}",
            stacklevel=2,
        )
    return Exported(size, report.ops, report.linears, report.left)
