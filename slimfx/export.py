"""A compressed program in the form of a place that deploys it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from slimfx.errors import ArtifactError
from slimfx.runtime.targets import aoti, hf, onnx, pt2, pte


@dataclass(frozen=True)
class Target:
    """A place that deploys programs."""

    ending: str
    """Of a file's name, "" for a folder."""
    needs: str
    """At run time."""
    size: float
    """Of all its files, relative to the .pt2 of form op: examples/demo_lm under the recipe joint,
    by the commands of README.md, "Where it runs"."""
    inputs: str
    """What becomes of the inputs of compressed linears."""
    options: tuple[str, ...]
    """Of `export`, besides program, target and path."""
    check: Callable[..., Any]
    """The `check` of its module."""


TARGETS = {
    "pt2": Target(".pt2", "torch", 1.01, "as they are", (), pt2.check),
    "aoti": Target(
        ".pt2",
        "torch or libtorch of the same minor version, a processor as --march says",
        1.17,
        "as they are, or rounded to 8 bits",
        ("march", "accuracy", "device"),
        aoti.check,
    ),
    "pte": Target(
        ".pte",
        "executorch",
        2.11,
        "rounded to 8 bits, or as they are",
        ("accuracy",),
        pte.check,
    ),
    "onnx": Target(
        ".onnx",
        "onnxruntime",
        1.30,
        "as they are, or rounded to 8 bits",
        ("accuracy",),
        onnx.check,
    ),
    "hf": Target(
        "",
        "transformers, peft and compressed-tensors, or vLLM",
        1.26,
        "as they are",
        ("dtype",),
        hf.check,
    ),
}
"""Name -> target; the first of two ways with inputs is the default."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    bytes: int
    notes: tuple[str, ...] = ()
    """What the user should know: what was left out, widened or rounded, a sentence each."""
    kernels: int = 0
    """Calls of our kernels, for "aoti"; linears that read the same input share one."""
    linears: int = 0
    """Compressed linears in them."""


def export(
    program: ExportedProgram,
    target: str,
    path: str | Path,
    *,
    march: str | None = None,
    accuracy: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Exported:
    """Write a program for a target.

    Args:
        target: "pt2", plain ATen that torch runs; "aoti", machine code with our kernels in it, for
            torch or libtorch; "pte" for ExecuTorch; "onnx" for ONNX Runtime; "hf", a folder for
            transformers, peft and vLLM.
        march: of "aoti": "native" (the default) for this processor, "x86-64-v3" (AVX2) or
            "x86-64-v4" (AVX-512) for others.
        accuracy: "exact", or "int8-activations" to round the inputs of compressed linears, row by
            row, to eight bits. By default exact, but for "pte", whose fast kernels round.
        dtype: of "hf": "bfloat16" or "float16" for what is stored as floats.
        device: of "aoti": "cpu" (the default), or "cuda" for a GPU like this machine's, which takes
            programs captured in bfloat16 or float16.

    Raises:
        ArtifactError: unknown target, an option that it does not take or of another value, missing
            folder, or something in the program that the target cannot express.
        SlimError: a package that the target needs is not installed.
    """
    path = Path(path)
    if target not in TARGETS:
        raise ArtifactError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    given = {"march": march, "accuracy": accuracy, "dtype": dtype, "device": device}
    for name, value in given.items():
        if value is not None and name not in TARGETS[target].options:
            raise ArtifactError(f"target {target} takes no {name}, {value!r} was given")
    if accuracy not in (None, *aoti.ACCURACIES):
        raise ArtifactError(f"accuracy {accuracy!r} is not one of {', '.join(aoti.ACCURACIES)}")
    rounded = accuracy == "int8-activations"
    if target == "aoti":
        how = (march or "native", accuracy or "exact", device or "cpu")
        return _compiled(program, path, *how)
    if target == "pt2":
        return Exported(pt2.save(program, path, form="aten"))
    if target == "onnx":
        return Exported(*onnx.save(program, path, accuracy_level=4 if rounded else 1))
    if target == "pte":
        form = "portable" if accuracy == "exact" else "xnnpack"
        return Exported(*pte.save(program, path, form=form))
    return Exported(*hf.save(program, path, dtype=dtype))


def _compiled(
    program: ExportedProgram, path: Path, march: str, accuracy: str, device: str
) -> Exported:
    size, report = aoti.save(program, path, march=march, accuracy=accuracy, device=device)
    if report.left:
        warnings.warn(
            f"{path}: {len(report.left)} compressed linears have no kernel and were written out in "
            f"ATen, which is slow; the first: {report.left[0]}",
            stacklevel=3,
        )
    return Exported(size, report.left, report.ops, report.linears)
