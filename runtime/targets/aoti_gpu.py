"""A package for a GPU: the GPU it is for, the program on it, inputs on their way there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from slimfx.passes.lower_gpu import LoweredGpu, lower_gpu
from slimfx.runtime import gpu_ops
from slimfx.runtime.select import gpu_of
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from slimfx.errors import ArtifactError

TOLERANCE = 2e-2
"""Largest difference from golden outputs, relative to the largest of them: values between layers
are bfloat16 or float16, and sums of another order."""


def gpu_name(device: str, accuracy: str) -> str:
    """The GPU that a device is, as its compiler names it; "" for the processor.

    Raises:
        ArtifactError: there is none, or packages for it know no such accuracy.
    """
    if device == "cpu":
        return ""
    if device.partition(":")[0] != "cuda":  # what torch calls AMD's, too
        raise ArtifactError(f"device {device!r} is not cpu or cuda")
    if accuracy != "exact":
        raise ArtifactError(f"accuracy {accuracy!r} is for processors; on {device!r} it is exact")
    if not torch.cuda.is_available():
        raise ArtifactError(
            f"device {device!r}: torch {torch.__version__} sees no GPU here; a package for one is "
            f"compiled on a machine that has it"
        )
    gpu = gpu_of(torch.device(device))
    return f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch)


def lowered_on(device: str, program: ExportedProgram) -> tuple[ExportedProgram, LoweredGpu]:
    """The program on a GPU, with weights as templates read them.

    Raises:
        ArtifactError: as `check_templates`.
    """
    from torch.export.passes import move_to_device_pass

    where = torch.device(device)
    if where.index is None:  # or what the program asserts of its tensors would not hold
        where = torch.device(where.type, torch.cuda.current_device())
    lowered, report = lower_gpu(program, gpu_of(where), layouts=("stored",))
    check_templates(lowered)
    return move_to_device_pass(lowered, str(where)), report


def check_templates(program: ExportedProgram) -> None:
    """Refuse a linear that a GPU's package has no kernel for.

    Raises:
        ArtifactError: there is one; says why.
    """
    from slimfx.runtime.inductor.gpu_linear import why_no_template  # loads the compiler, slow

    for node in [node for node in program.graph.nodes if node.target is gpu_ops.OP]:
        x, _, stored, form, rows, rank = node.args
        held = gpu_ops.Held([], stored, gpu_ops.forms(form), rows, rank)
        reason = why_no_template(held, x.meta["val"].dtype)
        if reason is not None:
            raise ArtifactError(
                f"{node.name}: {reason}; capture with dtype='bfloat16', compress to int4 or 2:4 "
                f"int4 with int4 adapters, or compile the .pt2 with backend='slim'"
            )


def check_gpu(path: Any, wanted: str) -> None:
    """Refuse a package for another GPU than that of this machine; "" is for none."""
    here = gpu_name("cuda", "exact") if wanted and torch.cuda.is_available() else "none"
    if wanted and here != wanted:
        raise ArtifactError(
            f"{path}: was built for a GPU of {wanted}, here is {here}; export it there again"
        )


def on_gpu(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a package says to inputs from anywhere: outputs are where the inputs are."""
    given = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
    args, kwargs = tree_map_only(torch.Tensor, lambda t: t.cuda(), (args, kwargs))
    found = run(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda t: t.to(given[0].device), found) if given else found
