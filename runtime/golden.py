"""Golden outputs: what a program answered to its example inputs when it was saved, to ask again
anywhere.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from slimfx.errors import ArtifactError

_KEPT = 256
"""Elements kept of each output, evenly spaced; a digest stands for the rest."""


@dataclass(frozen=True)
class CheckResult:
    """How the outputs of this machine differ from the golden ones."""

    identical: bool
    """Every output is the same to the bit."""
    max_difference: float
    """Largest difference over the kept elements, relative to the largest golden value."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Identical, or within the tolerance."""
        return self.identical or self.max_difference <= self.tolerance


def record(program: ExportedProgram, inputs: tuple[tuple, dict[str, Any]]) -> bytes:
    """Run a program on (args, kwargs) and store inputs, samples of the outputs and their
    digests.
    """
    flat, _ = pytree.tree_flatten(inputs)
    outputs = _run(program, inputs)
    tensors = {f"input.{i}": t.contiguous() for i, t in enumerate(flat) if isinstance(t, Tensor)}
    plain = {f"input.{i}": v for i, v in enumerate(flat) if not isinstance(v, Tensor)}
    tensors |= {f"output.{i}": _sample(t) for i, t in enumerate(outputs)}
    metadata = {"plain": json.dumps(plain), "digests": json.dumps([_digest(t) for t in outputs])}
    return safetensors.torch.save(tensors, metadata=metadata)


def inputs_of(golden: bytes, program: ExportedProgram) -> tuple[tuple, dict[str, Any]]:
    """The recorded inputs as (args, kwargs)."""
    tensors, metadata = _parse(golden)
    plain = json.loads(metadata["plain"])
    count = sum(name.startswith("input.") for name in tensors) + len(plain)
    flat = [tensors.get(f"input.{i}", plain.get(f"input.{i}")) for i in range(count)]
    args, kwargs = pytree.tree_unflatten(flat, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def replay(program: ExportedProgram, golden: bytes, tolerance: float) -> CheckResult:
    """Run a program on the recorded inputs and compare."""
    tensors, metadata = _parse(golden)
    digests = json.loads(metadata["digests"])
    outputs = _run(program, inputs_of(golden, program))
    if len(outputs) != len(digests):
        raise ArtifactError(f"the program has {len(outputs)} outputs, {len(digests)} were recorded")
    worst = 0.0
    for i, output in enumerate(outputs):
        expected = tensors[f"output.{i}"].double()
        scale = max(expected.abs().max().item(), 1e-30) if expected.numel() else 1.0
        difference = (
            (_sample(output).double() - expected).abs().max().item() if expected.numel() else 0.0
        )
        worst = max(worst, difference / scale)
    same = [_digest(t) for t in outputs] == digests
    return CheckResult(identical=same, max_difference=worst, tolerance=tolerance)


def _run(program: ExportedProgram, inputs: tuple[tuple, dict[str, Any]]) -> list[Tensor]:
    module = program.module()
    for part in module.modules():  # a program that writes to its buffers must not change here
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.clone()
    copies = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = module(*copies[0], **copies[1])
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _sample(output: Tensor) -> Tensor:
    flat = output.detach().reshape(-1)
    if len(flat) <= _KEPT:
        return flat.clone()
    return flat[torch.linspace(0, len(flat) - 1, _KEPT, dtype=torch.float64).long()].clone()


def _digest(output: Tensor) -> str:
    data = output.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def _parse(golden: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors = safetensors.torch.load(golden)
        length = int.from_bytes(golden[:8], "little")
        return tensors, json.loads(golden[8 : 8 + length])["__metadata__"]
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"the golden outputs are damaged: {error}") from error
